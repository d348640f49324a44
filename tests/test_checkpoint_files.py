"""Files of a checkpoint: what is written, and what a kill or a damaged file does."""

import hashlib
import json
import os
import random
import shutil
import threading
from pathlib import Path

import models
import pytest
import torch
from lifecycle import patched, predict, unchanged
from safetensors.torch import load_file, save
from training import adam, assert_equal, batches, state, train

import hal_kernels
from hal_kernels import export_lora, load_adapter, save_adapter
from hal_kernels.files import held

JSON = "adapter.json"

pytestmark = pytest.mark.usefixtures("small_hypernets")


def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def tensor_file(folder):
    (found,) = folder.glob("adapter-*.safetensors")
    return found


def rewrite(folder, change=None, tensors=None):
    """Forge a checkpoint: alter what it says, or its tensors, and all that vouches for them."""
    header = json.loads((folder / JSON).read_text())
    values = load_file(tensor_file(folder))
    if tensors is not None:
        tensors(values)
    del header["tensors"]["sha256"]
    if change is not None:
        change(header)
    original = {key: value for key, value in header.items() if key != "tensors"}
    data = save(values, {"header": json.dumps(original)})
    if isinstance(header.get("tensors"), dict):
        header["tensors"].setdefault("sha256", hashlib.sha256(data).hexdigest())
    tensor_file(folder).write_bytes(data)
    (folder / JSON).write_text(json.dumps(header))


# -- files -----------------------------------------------------------------------------------------


def test_files_and_their_content(saved):
    model, folder = saved
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".safetensors"]
    header = json.loads((folder / JSON).read_text())
    digest = hashlib.sha256(tensor_file(folder).read_bytes()).hexdigest()
    assert tensor_file(folder).name == f"adapter-{digest[:16]}.safetensors"
    assert header["tensors"] == {"file": tensor_file(folder).name, "sha256": digest}
    assert header["format"] == 1 and header["steps"] == 5
    assert hal_kernels.HALConfig.from_dict(header["config"]) == model.hal.config
    expected = {"name": "up.0", "d_in": 16, "d_out": 24, "rank": 3, "init_rank": 3, "scaling": 4.0}
    assert header["layers"][0] == expected
    assert header["saved_modules"] == ["classifier"]
    tensors = load_file(tensor_file(folder))
    assert set(tensors) == {f"hal.{k}" for k in model.hal.state_dict()} | {
        "saved.classifier.weight",
        "saved.classifier.bias",
    }


def test_saving_changes_nothing_and_replaces_the_former_files(tmp_path):
    model = patched()
    folder = tmp_path / "a" / "b"
    for steps in range(3):
        train(model, adam(model), batches(model, 1))
        with unchanged(model):
            save_adapter(model, str(folder))
        assert len(list(folder.iterdir())) == 2
        assert load_adapter(models.net(), str(folder)).hal.steps == steps + 1
    (folder / "README.md").write_text("mine")
    save_adapter(model, folder)  # the same state again
    assert len(list(folder.iterdir())) == 3
    assert oct(os.stat(folder / JSON).st_mode & 0o777) == oct(0o666 & ~current_umask())


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_leftovers_of_killed_saves_do_not_matter(saved, tmp_path):
    model, folder = saved
    folder = copied(folder, tmp_path)
    (folder / f".{JSON}.abc").write_text("{")
    (folder / ".adapter-0.safetensors.x").write_bytes(b"half")
    nobodys = folder / f"adapter-{'0' * 16}.safetensors"
    nobodys.write_bytes(b"whole, but no JSON names it")
    assert_equal(state(load_adapter(models.net(), folder)), state(model))
    save_adapter(model, folder)
    assert not nobodys.exists()
    assert_equal(state(load_adapter(models.net(), folder)), state(model))


def test_a_folder_that_cannot_be_written(tmp_path):
    model = patched()
    (tmp_path / "file").write_text("")
    message = r"expected a folder: .*file is a file"
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        for write in (save_adapter, export_lora):
            with unchanged(model), pytest.raises(NotADirectoryError, match=message):
                write(model, path)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [("hal.lam", torch.nan), ("hal.p_16", torch.inf), ("classifier.bias", torch.nan)],
)
def test_what_no_training_goes_on_from_is_not_saved(name, value, tmp_path):
    model = patched()
    model.get_parameter(name).data[0] = value
    message = rf"'{name.rpartition('.')[2]}' for .* holds NaN or Inf"
    with unchanged(model), pytest.raises(ValueError, match=message):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_infinity_in_a_module_trained_in_full(tmp_path):
    """It may be meant: a bias of -Inf rules a class out."""
    model = patched()
    model.classifier.bias.data[0] = -torch.inf
    save_adapter(model, tmp_path)
    assert_equal(state(load_adapter(models.net(), tmp_path)), state(model))


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_former_checkpoint(call, saved, tmp_path, monkeypatch):
    model, folder = saved
    folder = copied(folder, tmp_path)
    other = patched(seed=3)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    names = sorted(p.name for p in folder.iterdir())
    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(os, "fdopen", full)
        else:
            patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(other, folder)
    assert sorted(p.name for p in folder.iterdir()) == names
    assert_equal(state(load_adapter(models.net(), folder)), state(model))


def test_what_a_living_process_writes_is_left_alone(saved, tmp_path):
    model, folder = saved[0], copied(saved[1], tmp_path)
    other = folder / f".{JSON}.ab12cd34"
    thread = threading.Thread(target=save_adapter, args=(model, folder))
    with held(folder, []):
        other.write_text("being written")
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and other.exists()
    thread.join()
    assert not other.exists() and len([*folder.iterdir()]) == 2
    (folder / f".{JSON}.swp").write_text("an editor's")
    save_adapter(model, folder)
    assert (folder / f".{JSON}.swp").exists()


# -- damage ----------------------------------------------------------------------------------------


def refuse(folder, message, error=ValueError):
    """Loading fails, into an unpatched model and a patched one, and changes neither."""
    plain, adapted = models.net(), patched(init_rank=3, interval=2, allocation="ema", seed=2)
    for model in (plain, adapted):
        with unchanged(model), pytest.raises(error, match=message):
            load_adapter(model, folder)


def test_no_checkpoint(tmp_path):
    refuse(tmp_path, r"holds no adapter checkpoint \(adapter\.json is missing\)", FileNotFoundError)
    refuse(tmp_path / "nowhere", r"holds no adapter checkpoint", FileNotFoundError)


def test_damaged_tensor_file(saved, tmp_path):
    """Cut short, or with a bit flipped."""
    folder = copied(saved[1], tmp_path)
    file = tensor_file(folder)
    data, chance = file.read_bytes(), random.Random(0)
    damaged = [data[:left] for left in (0, 1, 7, 100, -1)]
    for position in (0, len(data) - 1, *(chance.randrange(len(data)) for _ in range(10))):
        flipped = bytearray(data)
        flipped[position] ^= 1 << chance.randrange(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        file.write_bytes(content)
        refuse(
            folder, r"adapter-\w+\.safetensors is damaged: its SHA-256 is \w+, adapter\.json says"
        )


def test_missing_and_swapped_tensor_file(saved, tmp_path):
    folder = copied(saved[1], tmp_path)
    other = tmp_path / "other"
    save_adapter(patched(init_rank=3, interval=2, allocation="ema", seed=6), other)
    shutil.copy(tensor_file(other), tensor_file(folder))
    refuse(folder, "is damaged: its SHA-256")
    name = tensor_file(folder).name
    tensor_file(folder).unlink()
    refuse(folder, f"names {name}, which is missing")


def test_flipped_bits_of_the_json(saved, tmp_path):
    """Whatever a single flipped bit does to the JSON, no other adapter than the saved one loads."""
    model, folder = saved
    folder = copied(folder, tmp_path)
    data = (folder / JSON).read_bytes()
    expected, chance = state(model), random.Random(0)
    for position in chance.sample(range(len(data)), 120):
        flipped = bytearray(data)
        flipped[position] ^= 1 << chance.randrange(8)
        (folder / JSON).write_bytes(flipped)
        target = models.net()
        try:
            load_adapter(target, folder)
        except (ValueError, FileNotFoundError):
            continue
        assert target.hal.config == model.hal.config, bytes(flipped[position - 20 : position + 20])
        assert_equal(state(target), expected)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"adapter"', "{}", '{"format": 1}', "\ud800", "[" * 100_000],
    ids=lambda text: repr(text[:16]),
)
def test_json_that_is_no_checkpoint(text, saved, tmp_path):
    folder = copied(saved[1], tmp_path)
    (folder / JSON).write_bytes(text.encode("utf-8", "surrogatepass"))
    refuse(folder, r"adapter\.json is not a valid checkpoint")


def put(*path_and_value):
    *path, key, value = path_and_value

    def change(header):
        for part in path:
            header = header[part]
        header[key] = value

    return change


def drop(key):
    return lambda header: header.pop(key)


def forged_rank(rank):
    def change(header):
        header["config"] |= {"rank": rank, "init_rank": rank}
        for layer in header["layers"]:
            layer |= {"rank": rank, "init_rank": rank, "scaling": 8 / min(rank, 10**300)}

    return change


def forged_patterns(rank, init_rank):
    """With a rank_pattern, layers may start with other ranks than the configuration's."""

    def change(header):
        header["config"] |= {"rank": rank, "init_rank": init_rank, "rank_pattern": {"up.0": 3}}
        for layer in header["layers"]:
            layer["scaling"] = 8 / rank

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", 2), r"has format 2, expected 1"),
        (put("format", "1"), r"has format '1', expected 1"),
        (put("tensors", "file", "../adapter.safetensors"), r"names the tensor file '\.\./adap"),
        (put("tensors", "file", "/etc/passwd"), r"names the tensor file '/etc/passwd'"),
        (put("tensors", "file", 3), r"names the tensor file 3, expected adapter-<16 digits>\.safe"),
        (put("tensors", "file", "\0\ud800"), r"names the tensor file '\\x00\\ud800'"),
        (put("tensors", "file", ".."), r"names (the tensor file )?'?\.\."),
        (put("tensors", "file", JSON), r"names the tensor file 'adapter\.json'"),
        (put("tensors", "sha256", "0" * 64), r"is damaged: its SHA-256 is \w+, adapter\.js"),
        (put("tensors", []), r"not a valid checkpoint"),
        (put("config", "learning_rate", 1.0), r"config has unknown options: 'learning_rate'"),
        (put("config", "gamma", "0.1"), r"gamma is '0\.1', expected a number"),
        (put("config", "dtype", "int8"), r"dtype is 'int8', expected one of"),
        (put("config", "rank", 9), r"init_rank is 3, expected at least rank = 9"),
        (put("config", "init_rank", None), r"init_rank"),
        (put("config", "init_rank", 1000), r"init_rank"),
        (put("config", "targets", 5), r"targets"),
        (put("config", "modules_to_save", "("), r"modules_to_save"),
        (put("config", []), r"not a valid checkpoint|don't fit"),
        (put("config", "hypernet", "bert"), r"missing .*unexpected|hypernet='bert'"),
        (put("layers", 3), r"not a valid checkpoint"),
        (put("layers", []), r"layers"),
        (put("layers", [{"name": "up.0"}]), r"not a valid checkpoint"),
        (put("layers", 0, "rank", 4), r"'up\.0' has rank 4 and init_rank 3, expected rank <= init"),
        (put("layers", 0, "rank", 2), r"'lam' for the adapter has shape \(12,\), expected \(11,\)"),
        (put("layers", 0, "init_rank", 10**8), r"init_rank 100000000, expected .* <= 16"),
        (put("layers", 0, "init_rank", 4), r"init_rank of 'up\.0' is 4, not 3"),
        (put("layers", 0, "scaling", 0.5), r"scaling of 'up\.0' is 0\.5, not 4\.0"),
        (put("layers", 0, "scaling", float("inf")), r"scaling of layer 'up\.0' is inf"),
        (forged_rank(10**8), r"rank 100000000 and init_rank 100000000, expected .* <= 16"),
        (forged_rank(16), r"'lam' for the adapter has shape \(12,\), expected \(64,\)"),
        (forged_rank(10**400), r"not a valid checkpoint"),
        (put("config", "alpha", 10**400), r"not a valid checkpoint"),
        (put("config", "targets", "(" * 5000), r"not a valid checkpoint"),
        (put("config", "targets", "a{99999999999}"), r"not a valid checkpoint"),
        (put("layers", 0, "rank", "3"), r"rank"),
        (put("layers", 0, "rank", -3), r"rank|shape"),
        (put("layers", 0, "d_in", 8), r"'up\.0' as 8 -> 24, here it is 16 -> 24"),
        (put("layers", 0, "name", "query"), r"'query'"),
        (put("layers", 0, "name", 3), r"3"),
        (put("layers", 0, "name", "up"), r"'up'"),
        (put("layers", 1, {"name": "up.0", "d_in": 16, "d_out": 24, "rank": 3}), r"up\.[01]"),
        (drop("layers"), r"'layers'"),
        (drop("config"), r"'config'"),
        (drop("saved_modules"), r"'saved_modules'"),
        (forged_patterns(rank=4, init_rank=5), r"start with 12 directions, expected at least 16"),
        (forged_patterns(rank=2, init_rank=None), r"init_rank is None, expected an int"),
        (put("saved_modules", 3), r"not a valid checkpoint"),
        (put("saved_modules", {"classifier": 1}), r"saved_modules is {.*}, expected a list"),
        (put("saved_modules", []), r"classifier"),
        (put("saved_modules", ["head"]), r"'head'"),
        (put("saved_modules", ["up.0"]), r"'up\.0'"),
        (put("saved_modules", ["down", "classifier"]), r"'down' in full, which holds \['down\.0'"),
        (put("saved_modules", [""]), r"holds '', which Net lacks"),
        (put("saved_modules", ["classifier", "classifier"]), r"expected distinct names"),
        (put("steps", "many"), r"steps is 'many', expected an int"),
        (put("steps", 99), r"says steps 99, its tensors say 5"),
    ],
)
def test_altered_json(change, message, saved, tmp_path):
    folder = copied(saved[1], tmp_path)
    rewrite(folder, change)
    refuse(folder, message)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (drop("hal.mask"), r"missing \['mask'\], unexpected \[\]"),
        (drop("hal.lam"), r"missing \['lam'\], unexpected \[\]"),
        (put("hal.extra", torch.ones(1)), r"missing \[\], unexpected \['extra'\]"),
        (put("extra", torch.ones(1)), r"tensors of nothing it names: \['extra'\]"),
        (put("hal.lam", torch.ones(5)), r"'lam' for the adapter has shape \(5,\)"),
        (put("hal.lam", torch.ones(())), r"'lam' for the adapter has shape \(\)"),
        (put("hal.lam", torch.ones(12).int()), r"'lam' for the adapter has dtype torch\.int32"),
        (put("hal.lam", torch.ones(12).cfloat()), r"'lam' for .* has dtype torch\.complex"),
        (put("hal.lam", torch.ones(12).double()), r"'.*' for .* has dtype .*, expected .*64"),
        (put("hal.lam", torch.ones(12) / 0), r"'lam' for the adapter holds NaN or Inf"),
        (put("hal.p_16", torch.ones(6, 16) * torch.nan), r"'p_16' for .* holds NaN or Inf"),
        (put("hal.mask", torch.full((12,), 0.5)), r"'mask' for .* holds other values than"),
        (drop("saved.classifier.bias"), r"'classifier' don't fit; missing \['bias'\]"),
        (put("saved.classifier.weight", torch.ones(4, 16)), r"'weight' for 'classifier' has shape"),
        (put("saved.classifier.bias", torch.ones(3).int()), r"'bias' for 'classifier' has dtype"),
        (put("saved.classifier.bias", torch.ones(3) / 0 * 0), r"'bias' for 'classifier' holds N"),
        (drop("hal._extra_state"), r"missing \['_extra_state'\]"),
        (put("hal._extra_state", torch.ones(2).long()), r"_extra_state. for the adapter has sh"),
        (put("hal._extra_state", torch.tensor([-5])), r"_extra_state begins with -5\.0"),
        (put("hal._extra_state", torch.tensor([0.5])), r"_extra_state. for the adapter has dtype"),
        (put("hal._extra_state", torch.tensor([torch.nan])), r"_extra_state. for .* has dtype"),
        (put("hal._extra_state", torch.tensor([5j])), r"_extra_state. for the adapter has dtype"),
        (put("hal._extra_state", torch.tensor(5)), r"_extra_state. for the adapter has shape \(\)"),
        (put("hal._extra_state", torch.tensor([]).long()), r"_extra_state. for .* has shape"),
        (put("hal._extra_state", torch.tensor([6])), r"says steps 5, its tensors say 6"),
    ],
)
def test_altered_tensors(tensors, message, saved, tmp_path):
    folder = copied(saved[1], tmp_path)
    rewrite(folder, tensors=tensors)
    refuse(folder, message)


@pytest.mark.parametrize(("offsets", "scale"), [("all", 30.0), ("lam", 100.0)])
def test_an_earlier_version_s_offsets_and_sketches(offsets, scale, tmp_path):
    """Written when hypernetworks had offsets and first steps kept sketches: the same function."""
    model = hal_kernels.patch_model(models.net(), 2, hypernet="bert", seed=1)
    train(model, adam(model), batches(model, 3))
    save_adapter(model, tmp_path)

    def earlier(tensors):
        names = [n for n in tensors if n.startswith("hal.anchor_") and offsets in (n[11:], "all")]
        for name in names:
            offset = torch.randn_like(tensors[name])
            tensors[name.replace("anchor_", "offset_")] = offset
            tensors[name] -= scale * offset
        tensors["hal._extra_state"] = torch.tensor([3.0, *torch.randn(5)], dtype=torch.float64)

    rewrite(tmp_path, lambda h: h["config"].update(init="gradient", offsets=offsets), earlier)
    loaded = load_adapter(models.net(), tmp_path)
    assert loaded.hal.steps == 3
    batch = models.batch(model)
    # float32: an anchor of size 1 is found again from a difference of numbers of size 100.
    torch.testing.assert_close(predict(loaded, **batch), predict(model, **batch), rtol=0, atol=1e-4)
    rewrite(tmp_path, tensors=lambda t: t.pop("hal.anchor_lam"))
    with pytest.raises(ValueError, match="'offset_lam' without a fitting 'anchor_lam'"):
        load_adapter(models.net(), tmp_path)


@pytest.mark.parametrize(
    "original", ["[]", "3", "null", "[" * 100_000, "{", "{}", None], ids=lambda text: str(text)[:9]
)
def test_tensor_files_own_header(original, saved, tmp_path):
    """None: the file is no safetensors file at all."""
    folder = copied(saved[1], tmp_path)
    header = json.loads((folder / JSON).read_text())
    data = b"\xff" * 64
    if original is not None:
        data = save(load_file(tensor_file(folder)), {"header": original})
    tensor_file(folder).write_bytes(data)
    header["tensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / JSON).write_text(json.dumps(header))
    altered = "" if original is None else "|was altered after it was saved"
    refuse(folder, f"is not a valid safetensors file{altered}")


def test_json_altered_alone(saved, tmp_path):
    folder = copied(saved[1], tmp_path)
    header = json.loads((folder / JSON).read_text())
    header["config"]["gamma"] = 0.5
    (folder / JSON).write_text(json.dumps(header))
    refuse(folder, r"was altered after it was saved: its tensors were saved with another 'config'")


def test_a_regular_expression_that_takes_for_ever(saved, tmp_path):
    """What patterns say of each layer is saved with it: loading matches none."""
    folder = copied(saved[1], tmp_path)
    pattern = r"(.*.*)*x"

    def change(header):
        header["config"] |= {
            "rank_pattern": {pattern: 3}, "alpha_pattern": {pattern: 8.0}, "targets": pattern,
            "exclude": pattern, "modules_to_save": pattern,
        }  # fmt: skip

    rewrite(folder, change)
    assert_equal(state(load_adapter(models.net(), folder)), state(saved[0]))

    def drop_what_they_say(header):
        change(header)
        for layer in header["layers"]:
            del layer["init_rank"], layer["scaling"]

    rewrite(folder, drop_what_they_say)
    refuse(folder, r"not a valid checkpoint: .*init_rank.*scaling")
