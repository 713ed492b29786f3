"""What kind of checkpoint is taken at all, judged by its configuration.

Torch-free. What would run but give wrong numbers is refused with the reason: a model that is no
causal language model, code of the checkpoint's own, weights quantized in a way that is not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qbench.errors import QBenchError
from qbench.models.bitnet.formats import check_entry

if TYPE_CHECKING:
    from qbench.models.checkpoints import Checkpoint

CAUSAL = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")


def check_architecture(checkpoint: Checkpoint) -> None:
    """Refuse what is no causal language model.

    Raises:
        QBenchError: naming the class.
    """
    names = checkpoint.config.get("architectures") or []
    check_entry(checkpoint.name, "architectures", names, list, "a list of class names")
    if names and not any(str(n).endswith(CAUSAL) for n in names):
        raise QBenchError(
            f"{checkpoint.name} is a {names[0]}, not a causal language model; qbench measures "
            "next-token prediction"
        )


def check_quantization(checkpoint: Checkpoint) -> None:
    """Refuse what is quantized already, but for the BitNet and GPTQ formats that are read.

    Also a model class of a checkpoint's own code: transformers would run it as another model.

    Raises:
        QBenchError: naming the class, or the method.
    """
    own = (checkpoint.config.get("auto_map") or {}).get("AutoModelForCausalLM")
    if own and checkpoint.bitnet is None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        name = str(own).rpartition(".")[2]
        if name.lower() not in map(str.lower, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
            raise QBenchError(
                f"{checkpoint.name} is a {name} of its own code, which is not run; as a plain "
                f"{checkpoint.config.get('model_type')} it would be another model"
            )
    quantized = checkpoint.config.get("quantization_config") or {}
    if quantized and checkpoint.bitnet is None and checkpoint.gptq is None:
        raise QBenchError(
            f"{checkpoint.name} is quantized already "
            f"(quant_method={quantized.get('quant_method', 'unknown')}); give its full-precision "
            "original"
        )
