"""Whole models: from a batch to losses in training, to outputs in evaluation."""

from trainkit.modeling.meta_arch.classifier import ImageClassifier

__all__ = ["ImageClassifier"]
