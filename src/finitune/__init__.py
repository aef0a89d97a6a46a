"""FiniTune: LLM fine-tuning that stays finite."""

__version__ = "0.1.0"
