"""Which of transformers' Auto classes opens a model: that of causal language models, or that of image-text models.

An image-text model is opened whole, although only its text is edited: its vision part is then saved with it, and what
was opened by one class is opened by the same class afterwards.
"""

from __future__ import annotations

from typing import Any

CAUSAL, IMAGE_TEXT = "AutoModelForCausalLM", "AutoModelForImageTextToText"


def auto_class_name(config: Any) -> str:
    """The name of the Auto class for a model with this config.

    The config's `architectures` decide. Without them, and where they name neither class, text alone comes first.
    """
    from transformers.models.auto import modeling_auto

    def of(mapping: str) -> set[str]:
        found = getattr(modeling_auto, mapping).get(config.model_type, ())
        return {found} if isinstance(found, str) else set(found)

    text, image = of("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"), of("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
    named = set(getattr(config, "architectures", None) or ())
    whole = bool(image) and (not text or bool(named & image - text))
    return IMAGE_TEXT if whole else CAUSAL


def auto_class(config: Any) -> Any:
    """transformers' Auto class for a model with this config."""
    import transformers

    return getattr(transformers, auto_class_name(config))
