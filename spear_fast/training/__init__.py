"""Training as the reference has it, on accelerate: three trainers, their datasets, and the generator of labels."""

from spear_fast.training.batches import ShuffledBatchSampler, TokenBudgetBatchSampler, lengths_of
from spear_fast.training.data import GeneratedAudioTextDataset, LabelledDataset, MockDataset
from spear_fast.training.generator import SemanticToTextDatasetGenerator
from spear_fast.training.trainer import SemanticToTextTrainer, SpeechSpeechPretrainer, TextToSemanticTrainer

__all__ = [
    "GeneratedAudioTextDataset",
    "LabelledDataset",
    "MockDataset",
    "SemanticToTextDatasetGenerator",
    "SemanticToTextTrainer",
    "ShuffledBatchSampler",
    "SpeechSpeechPretrainer",
    "TextToSemanticTrainer",
    "TokenBudgetBatchSampler",
    "lengths_of",
]
