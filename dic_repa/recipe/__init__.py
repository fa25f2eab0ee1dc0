"""Recipes: the schema, its files, what differs between two, and from sections to parts (`recipe.build`)."""

from dic_repa.recipe.files import list_paper_rows, list_recipes, load_recipe, load_training_recipe, to_yaml, validate
from dic_repa.recipe.schema import (
    AlignmentSection,
    DataSection,
    EndToEndSection,
    EvaluateSection,
    LatentSection,
    LoraSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    PaperSection,
    Recipe,
    SamplingRecipe,
    ScheduleSection,
    TrainSection,
)
from dic_repa.recipe.schema_sampling import GridSection, GuidanceSection, SampleSection

__all__ = [
    "AlignmentSection",
    "DataSection",
    "EndToEndSection",
    "EvaluateSection",
    "GridSection",
    "GuidanceSection",
    "LatentSection",
    "LoraSection",
    "ModelSection",
    "ObjectiveSection",
    "OptimizerSection",
    "PaperSection",
    "Recipe",
    "SampleSection",
    "SamplingRecipe",
    "ScheduleSection",
    "TrainSection",
    "list_paper_rows",
    "list_recipes",
    "load_recipe",
    "load_training_recipe",
    "to_yaml",
    "validate",
]
