"""The configs that come with trainkit, by name, and models from them."""

from trainkit.model_zoo.model_zoo import get, get_config, get_config_file

__all__ = ["get", "get_config", "get_config_file"]
