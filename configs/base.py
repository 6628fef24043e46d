"""The defaults that recipes start from; hashvision/config/schema.py explains each key."""

from hashvision.config.schema import get_config as get_config
