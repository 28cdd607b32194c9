"""Finds the class of transformers whose `from_pretrained` opens a saved model."""

from __future__ import annotations

import transformers
from transformers.models.auto import modeling_auto


# The most common tasks first: a model class may be listed under several tasks.
_MAPPINGS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForMultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForObjectDetection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "AutoModelForSemanticSegmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForCTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
}


def auto_class(architecture: str | None) -> str | None:
    """Returns the Auto class that opens models of class `architecture`.

    Without an Auto class it is the model class itself, and None where transformers has no class of that name.

    Example:
        >>> auto_class("BertForSequenceClassification"), auto_class("MyOwnModel")
        ('AutoModelForSequenceClassification', None)
    """
    for name, mapping in _MAPPINGS.items():
        for classes in getattr(modeling_auto, mapping, {}).values():
            if architecture in ([classes] if isinstance(classes, str) else classes):
                return name
    return architecture if architecture and hasattr(transformers, architecture) else None
