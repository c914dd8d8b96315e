"""Continuous batching: requests come and go at any time, and all that run share each step of the model."""

from jaxlm.inference.engine.engine import Engine
from jaxlm.inference.engine.request import Answering, EngineFull, Piece, PromptScores, Request, Times
from jaxlm.inference.engine.settings import Settings
from jaxlm.inference.engine.stats import Stats

__all__ = ["Answering", "Engine", "EngineFull", "Piece", "PromptScores", "Request", "Settings", "Stats", "Times"]
