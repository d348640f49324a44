"""HyperAdaLoRA and PEFT's AdaLoRA side by side: ``make demo``, or ``python -m examples.demo``."""
