"""Fine-tuning: the published recipe, the network with its head, and the module that Lightning trains."""

from nepa_plugin.finetuning.module import ClassifierModule
from nepa_plugin.finetuning.network import classifier
from nepa_plugin.finetuning.recipe import Recipe
from nepa_plugin.finetuning.scores import Scores

__all__ = ["ClassifierModule", "Recipe", "Scores", "classifier"]
