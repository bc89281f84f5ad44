"""Constraints on generated text: descriptions become grammars, grammars become one bit per token of the vocabulary.

Only this folder imports llguidance. It knows vocabularies; it knows neither devices nor requests.
"""

from engine.constraints.compiler import ConstraintCompiler

__all__ = ["ConstraintCompiler"]
