"""The default config, from which every recipe starts; hashvision/config/schema.py explains it."""

from hashvision.config.schema import get_config as get_config
