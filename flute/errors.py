"""Every refusal of flute is one of these.

A message is one line: what was given, which rule it breaks, where, and what to do about it.
"""


class FluteError(Exception):
    """Base of every error that flute raises on purpose."""


class SpecError(FluteError, ValueError):
    """A quantization spec, or a spec applied to a layer, breaks a rule."""


class QuantizeError(FluteError, ValueError):
    """Weights cannot be quantized (NaN, Inf, wrong rank or dtype)."""


class OperatorError(FluteError, ValueError):
    """Arguments of the operator do not fit together (shape, dtype, device)."""


class CheckpointError(FluteError, ValueError):
    """A checkpoint on disk is damaged, incomplete or not ours."""


class CompileError(FluteError, RuntimeError):
    """A kernel cannot be compiled or loaded on this machine."""


class TuneError(FluteError, RuntimeError):
    """Plans cannot be measured on this machine, or what was found cannot be kept."""


class IntegrationError(FluteError, RuntimeError):
    """Another library is missing, too old, or was asked for something it cannot do with flute."""


class CalibrationError(FluteError, ValueError):
    """Calibration data, or a model's answer to it, cannot be used."""
