"""The shared alphabet: what three methods share unchanged.

Steps come as pairs ``<step>_forward``, ``<step>_backward``; ``check`` guards the door;
``Mechanism`` and its siblings are the records that method files end with.
"""

from attention_ref.core import check, errors, examples
from attention_ref.core.dense import (
    default_scale,
    mix_backward,
    mix_forward,
    row_max,
    scores_backward,
    scores_forward,
    softcap_backward,
    softcap_forward,
    softmax_backward,
    softmax_forward,
    sum_to,
)
from attention_ref.core.masks import quarantine, quarantine_bias, visible
from attention_ref.core.numeric import absolute, logistic, norm, relu, scatter, softplus
from attention_ref.core.spec import (
    SOFTMAX_FLAGS,
    Analysis,
    Backend,
    Edit,
    Mechanism,
    Module,
    Policy,
    Reduction,
    Regularizer,
    Task,
    Theory,
    Training,
)

__all__ = [
    "SOFTMAX_FLAGS", "Analysis", "Backend", "Edit", "Mechanism", "Module", "Policy", "Reduction",
    "Regularizer", "Task", "Theory", "Training", "absolute", "check", "default_scale", "errors",
    "examples", "logistic", "mix_backward", "mix_forward", "norm", "quarantine",
    "quarantine_bias", "relu", "row_max", "scatter", "scores_backward", "scores_forward",
    "softcap_backward", "softcap_forward", "softmax_backward", "softmax_forward", "softplus",
    "sum_to", "visible",
]  # fmt: skip
