"""The defaults that recipes start from: those of hashvision/schema.py, which explains each key."""

from hashvision.schema import get_config as get_config
