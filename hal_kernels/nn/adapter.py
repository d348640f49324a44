"""The adapter of one model: packed factors, hypernetworks, masks and scores of all its layers.

Life of one training step
    forward    `open_forward` generates every layer's factors once, inside autograd; each layer
               takes its views (`layer_factors`); `close_forward` adds γ·penalty to the loss.
    backward   gradients of all layers arrive packed (one tensor per width) and flow on into the
               hypernetworks. The gradient of Λ_eff = Λ⊙mask is kept, unmasked, for the allocator.
    optimizer  `before_optimizer_step` and `after_optimizer_step` (called by `stepping`) skip a
               step with non-finite gradients, advance the state and allocate ranks.

Work over all layers is a constant number of torch calls, however many layers there are.
"""

import weakref
from collections.abc import Callable, Iterable, Set
from typing import Any

import torch
from torch import nn

from ..config import HALConfig
from ..ops.orthogonality_penalty import orthogonality_penalty
from ..ops.ragged import Slots
from .allocation import allocate, announce
from .calls import Calls
from .layout import Layout
from .notices import Notices
from .packed import Generation, LayerFactors, Packed
from .probes import Probed
from .processes import all_agree, expect_shared, share_state, world_size
from .recompute import Regenerate, inside_backward, refuse_reentrant
from .run_length import take_run_length
from .spectral import TANGENT, Taken, advance, register_scalings
from .state import State, saved_steps
from .tensors import all_finite, capturing
from .threads import Pass, PerThread

# State of a step under way, with its value in between. Never saved, never copied.
_TRANSIENT: dict[str, Any] = {
    "_stray": None, "_recent": None, "_cache": None, "_last_views": None, "_step_begins": True,
    "last_penalty": None, "shared": False, "replicated": frozenset(), "placed": False,
    "patched": None, "taken": None, "_run_begins": True,
}  # fmt: skip


class HyperAdapter(State):
    """Factors, hypernetworks and rank allocation of all adapted layers of one model.

    `patch_model` makes one and registers it as ``model.hal``. With a hypernetwork the factors are
    buffers, and the optimizer holds the hypernetworks; without one factors are parameters.

    Args:
        config: options, `init_rank` settled.
        layout: the adapted layers and their order.
        device: where the layers' weights are.
    """

    rows_p: torch.Tensor
    rows_q: torch.Tensor
    positions_p: torch.Tensor
    positions_q: torch.Tensor
    offsets_p: torch.Tensor
    offsets_lam: torch.Tensor
    offsets_q: torch.Tensor
    layer_scalings: torch.Tensor  # update="spectral": s of each layer, and of each direction
    row_scalings: torch.Tensor
    layer_rates: torch.Tensor  # update="spectral": η of each layer at a learning rate of 1

    _stray: tuple[Any, Generation] | None  # versions and generation: layers called by themselves
    _cache: tuple[Any, Generation] | None  # versions and generation, without a graph
    _recent: Packed | None  # values generated last in this step, for the state
    _last_views: list[LayerFactors] | None  # the same, for layers run again by checkpointing
    taken: Taken | None  # update="spectral": what the optimizer under way was kept from
    process_group: Any = None  # of those that train this together; None: the default group, if any
    shared: bool  # every process has the first one's state
    replicated: Set[int]  # ids of the parameters whose gradients `replicate` averages
    placed: bool  # everything was on one device when last looked at
    patched: weakref.ref[nn.Module] | None  # the model whose passes this adapter takes part in
    last_penalty: torch.Tensor | None  # γ·penalty in the last training forward's loss, if any
    _step_begins: bool  # the next pass with gradients is an accumulation window's first
    _run_begins: bool  # no optimizer step was taken since the adapter was made or loaded

    def __init__(self, config: HALConfig, layout: Layout, device: torch.device) -> None:
        super().__init__(config)
        self.tangent = TANGENT if config.spectral else 0.0
        """What the layers' operators scale the gradients of ΔW by that they leave; 0: dP and dQ."""
        self.steps = 0
        self.disabled = False
        self.saved_modules: dict[str, dict[str, torch.Tensor]] = {}
        """Original tensors of the modules trained in full, by module name."""
        self.__dict__.update(_TRANSIENT)
        self._passes, self.notices = PerThread(Pass), Notices()
        with torch.random.fork_rng(devices=[], enabled=config.seed is not None):
            if config.seed is not None:
                # The CPU's alone: torch.manual_seed would reseed every GPU, and none is restored.
                torch.default_generator.manual_seed(config.seed)
            self.make_tensors(layout)
        self.set_layout(layout)
        self._apply(lambda t: t if t.is_meta else t.to(device))  # some are under init_empty_weights

    def set_layout(self, layout: Layout) -> None:
        """Take over where each layer's rows lie (at the start, and after compaction)."""
        self.layout = layout
        self.scalings = [spec.scaling for spec in layout.layers]
        self.budget = self.config.budget(layout.narrowest)
        self.calls = Calls([spec.name for spec in layout.layers])
        if self.config.spectral:
            register_scalings(self)
        device = self.mask.device
        index = {"offsets_lam": layout.offsets}
        for name, side in (("p", layout.p), ("q", layout.q)):
            index |= {f"rows_{name}": side.rows, f"positions_{name}": side.positions}
            index |= {f"offsets_{name}": side.offsets}
            index |= {f"offsets_{name}_{g.width}": g.offsets for g in side.groups}
        for name, values in index.items():
            tensor = torch.tensor(values, dtype=torch.int64, device=device)
            self.register_buffer(name, tensor, persistent=False)
        self._make_probes()
        self.forget()

    def _make_probes(self) -> None:
        """Zeros added to generated factors: their gradients are those of the factors.

        Leaves, so that autograd sums them over micro-batches; no parameters, so that no optimizer
        moves them. "direct" needs none, and only "ema" scores look at P and Q.
        """
        self._probes: list[torch.Tensor] = []
        if self.direct:
            return
        watched = self.packed().tensors() if self.config.allocation == "ema" else [self.lam]
        self._probes = [torch.zeros_like(t, requires_grad=True) for t in watched]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "HyperAdapter":
        super()._apply(fn, recurse)
        self._make_probes()
        self.placed = False
        return self

    # -- forward ---------------------------------------------------------------------------------

    def forward(self, x: Any) -> Any:
        """Identity: a container that calls all its children, as nn.Sequential, passes through."""
        return x

    def open_forward(self) -> None:
        """Make every layer's factors ready for one forward pass of the model."""
        here = self._pass
        here.depth += 1
        if self.disabled or here.depth > 1:
            return
        if not torch.is_grad_enabled():
            here.live = self.current()
            return
        if not torch.compiler.is_compiling():
            share_state(self)
            self._begin_accumulation()
            if self._run_begins and self._step_begins:
                take_run_length(self)
        here.live, here.begins_step = self._generate_with_graph(), self._step_begins
        if here.live.effective.p[0].requires_grad:
            self._step_begins = False

    def close_forward(self) -> None:
        """Let go of the pass's graph; also after an exception inside the model."""
        here = self._pass
        if here.depth > 0:  # else another hook raised before the pass was opened
            here.depth -= 1
        if here.depth == 0:
            here.live = None

    def layer_factors(self, index: int) -> LayerFactors | None:
        """(P rows, Λ_eff, Q rows) for one layer's forward; None while disabled."""
        if self.disabled:
            return None
        live = self._passes.mine.live
        if live is not None:
            if not torch.is_grad_enabled() and live.effective.p[0].requires_grad:
                refuse_reentrant()
            return live.views[index]
        if not torch.is_grad_enabled():
            return self._stray_current().views[index]
        if inside_backward():
            refuse_reentrant()
            views = self._last_views
            if views is not None:
                return views[index]
        return self._stray_generation().views[index]

    def note_call(self, index: int) -> None:
        """One layer's forward is run."""
        if self.calls.idle and not torch.compiler.is_compiling():
            self.calls.idle.discard(index)

    def present_factors(self, index: int) -> LayerFactors:
        """One layer's (P rows, Λ_eff, Q rows) as they are now, detached; also while disabled."""
        return self._stray_current().views[index]

    @property
    def _pass(self) -> Pass:
        return self._passes.mine

    @property
    def in_pass(self) -> bool:
        """Whether layers are called by the model's forward, or again by checkpointing."""
        return self._pass.live is not None or inside_backward()

    @property
    def step_begins(self) -> bool:
        """Whether no pass with gradients has begun since the last optimizer step, nor is any
        under way in this thread."""
        return self._step_begins and self._pass.depth == 0

    @property
    def gamma(self) -> float:
        """Weight of the penalty: none where spectral steps keep P and Q orthonormal."""
        return 0.0 if self.config.spectral else self.config.gamma

    def penalty(self, packed: Packed | None = None) -> torch.Tensor:
        """γ · orthogonality penalty [eq. 7] of the factors of this pass (a scalar).

        "squared" averages over the layers, "frobenius" over their matrices, as PEFT's AdaLoRA does.
        """
        if packed is None:
            live = self._pass.live or (
                self._stray_generation() if torch.is_grad_enabled() else self.current()
            )
            packed = live.effective
        if torch.is_grad_enabled():
            self.notices.penalized = True
        if self.config.spectral:
            return packed.lam.new_zeros((), requires_grad=torch.is_grad_enabled())
        kind, count = self.config.penalty, len(self.layout.layers)
        sides = (("p", self.layout.p.groups), ("q", self.layout.q.groups))
        return orthogonality_penalty(
            [*packed.p, *packed.q],
            offsets=[getattr(self, f"offsets_{s}_{g.width}") for s, gs in sides for g in gs],
            max_ranks=[max(group.ranks) for _, groups in sides for group in groups],
            kind=kind,
            weight=self.config.gamma / (count if kind == "squared" else 2 * count),
        )

    def loss_term(self, *, counts_once: bool) -> torch.Tensor | None:
        """γ·penalty to be added to this forward's loss, or None.

        Args:
            counts_once: the loss is normalised over the whole accumulation window, of all
                processes, already (the caller passed num_items_in_batch): only the window's first
                micro-batch pays.
        """
        here = self._pass
        if here.live is None or self.gamma == 0.0 or (counts_once and not here.begins_step):
            return None
        term = self.penalty(here.live.effective)
        if not torch.compiler.is_compiling():
            self.last_penalty = term.detach()
        # Such a loss was multiplied by the number of processes, which average gradients.
        return term / world_size(self.process_group) if counts_once else term

    def _begin_accumulation(self) -> None:
        """Notice a new accumulation window: gradients were dropped since the last forward.

        After an optimizer step the flag is set already; this catches a step that GradScaler
        skipped and gradients the user threw away.
        """
        if not self._has_gradient():
            self._step_begins = True
            self._clear_probes()
        elif self.hypernet is not None:
            self._clear_probes_if_zeroed(self.hypernet.lam_out.bias.grad)

    def _clear_probes_if_zeroed(self, gradient: torch.Tensor | None) -> None:
        """zero_grad(set_to_none=False) leaves zeros: then the probes' gradients are zeroed alike.

        `gradient` is that of Λ's output bias, the sum of all dΛ: zero only if it was zeroed. It is
        looked at on the device.
        """
        if gradient is not None:
            for probe in self._probes:
                if probe.grad is not None:
                    probe.grad = torch.where(gradient != 0, probe.grad, 0.0)

    def _generate(self) -> Packed:
        """factors_{i+1} from the stored factors_i [eqs. 4-6]."""
        state = self.packed()
        if self.hypernet is None:
            return state
        prefix = {"anchor": "anchor_", "residual": ""}.get(self.config.update or "")
        base = None if prefix is None else self.packed(prefix)
        with torch.autocast(self.mask.device.type, enabled=False):
            return self.hypernet(state, self.mask, self.slots, base)

    @property
    def slots(self) -> Slots:
        """Where the rows of each layer's factors lie."""
        layout = self.layout
        return Slots(
            (self.rows_p, self.rows_q),
            (self.offsets_p, self.offsets_lam, self.offsets_q),
            (layout.p.counts, layout.q.counts),
            (layout.p.sizes, layout.q.sizes),
            layout.max_rank,
        )

    def replayed(self) -> None:
        """A CUDA graph has run a pass of the model: there is something to step.

        Only without a hypernetwork, whose pass generates new values.
        """
        self._recent = self.packed()

    def _generate_with_graph(self, *, once: bool = True) -> Generation:
        """One generation inside autograd.

        Args:
            once: one backward pass will run through it, as through any forward pass. Else it is
                generated again in each, so that any number of them may.
        """
        factors = self._generate() if once or self.direct else self.current().factors
        self._recent = factors.detach()
        if self.direct:
            effective = factors
        elif once:
            effective = self._probed(factors)
        else:
            generate = lambda: self._probed(self._generate()).tensors()  # noqa: E731
            tensors = Regenerate.apply(generate, *self.parameters(), *self._probes)
            effective = factors.like(tensors)
        generation = self._with_views(factors, effective)
        if not torch.compiler.is_compiling():
            self._last_views = generation.views
        return generation

    def _probed(self, factors: Packed) -> Packed:
        """Generated factors with Λ masked; their gradients are left in the probes."""
        effective, probe = factors, self._probes[0]
        if self.config.allocation == "ema":
            effective = factors.like(Probed.apply(*factors.tensors(), *self._probes))
            probe = self._probes[self._count_p]
        return effective._replace(lam=torch.addcmul(probe, factors.lam, self.mask))

    def _with_views(self, factors: Packed, effective: Packed) -> Generation:
        p, q = self.layout.p.split(effective.p), self.layout.q.split(effective.q)
        lam = effective.lam.split_with_sizes(self.layout.ranks)
        return Generation(factors, effective, list(zip(p, lam, q, strict=True)))

    @torch.no_grad()
    def current(self) -> Generation:
        """The factors as they are now, without a graph. Generated anew: nothing can be stale."""
        factors = self._generate()
        effective = factors if self.direct else factors._replace(lam=factors.lam * self.mask)
        return self._with_views(factors.detach(), effective.detach())

    def _stray_current(self) -> Generation:
        """For layers called outside the patched model's own forward, without gradients.

        Generated again after a change that autograd's version counters or addresses show.
        """
        versions = self._versions()
        cache = self._cache  # another thread's optimizer step may drop it
        if cache is None or cache[0] != versions:
            cache = self._cache = (versions, self.current())
        return cache[1]

    def _versions(self) -> tuple[Any, ...]:
        tensors = [*self.parameters(), *self.packed().tensors(), self.mask]
        # Inference tensors keep no version; they cannot be trained either.
        return tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)

    def _stray_generation(self) -> Generation:
        """For layers called outside the patched model's own forward, with gradients."""
        versions = self._versions()
        stray = self._stray
        if stray is None or stray[0] != versions:
            self._begin_accumulation()
            stray = self._stray = (versions, self._generate_with_graph(once=False))
        return stray[1]

    # -- optimizer step --------------------------------------------------------------------------

    def before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Skip the step if a gradient is NaN or Inf."""
        expect_shared(self)
        self.skip_if_nonfinite(p for group in optimizer.param_groups for p in group["params"])
        if self.config.spectral and self._has_gradient():
            self.taken = Taken(self, optimizer)

    def skip_if_nonfinite(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        """Drop all gradients if one of them is NaN or Inf, so that nothing is stepped by them.

        Args:
            parameters: what is stepped together with this adapter's own parameters.
        """
        if not self.config.skip_nonfinite or capturing(self.mask.device):
            return
        watched = [*parameters, *self.parameters(), *self._probes]
        stepped = {id(p): p for p in watched}
        found = [p.grad for p in stepped.values() if p.grad is not None]
        finite = all_agree(all_finite(found), self.mask.device, self.process_group)
        if found:  # else this is the second of several optimizers
            self.notices.gradients_checked(finite=finite)
        if not finite:
            for parameter in stepped.values():
                parameter.grad = None

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Advance the factors and allocate ranks, once per optimizer step that had gradients."""
        recent, taken = self._recent, self.taken
        moved = self._has_gradient() and self.watched().lam.grad is not None
        moved = taken is not None or moved
        if moved and recent is not None:  # else there was nothing to step
            self.steps += 1
            self._run_begins = False
            if self.steps == 1:
                announce(self)
            self.notices.step_taken(self.gamma)
            if not self.direct:
                torch._foreach_copy_(self.packed().tensors(), recent.tensors())
            allocate(self)
            if taken is not None:
                advance(self, taken)
        self.taken = None
        self._clear_probes()
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to a pass: the next forward begins a new step."""
        self._stray = self._recent = self._cache = self._last_views = None
        self._step_begins, self.placed = True, False

    def watched(self) -> Packed:
        """The leaves whose gradients are those of the factors (of Λ alone unless "ema").

        Autograd sums them over the micro-batches of a step; Λ's is dΛ_eff.
        """
        if self.direct:
            return self.packed()
        if self.config.allocation == "ema":
            return self.packed().like(self._probes)
        return Packed((), self._probes[0], ())

    def _clear_probes(self) -> None:
        for probe in self._probes:
            probe.grad = None

    # -- state -----------------------------------------------------------------------------------

    def get_extra_state(self) -> torch.Tensor:
        """The step counter, as a tensor so that safetensors can hold it."""
        return torch.tensor([self.steps], dtype=torch.int64)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.steps = saved_steps(state)
        self._run_begins = True
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {"_probes": [], "process_group": None, "notices": Notices()}
        return self.__dict__ | _TRANSIENT | fresh

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_probes()

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"layers={len(self.layout.layers)}, rank={config.rank}, init_rank={config.init_rank}, "
            f"hypernet={config.hypernet!r}, update={config.update!r}, steps={self.steps}"
        )
