"""How Gemma 3n is asked for what is said in a clip, in the words of the model's documentation: task, then sound."""

from gemma_jax.text.translategemma import Language

AS_SPOKEN = "Transcribe the following speech segment:"


def of_clip(spoken: Language | None, target: Language | None) -> str:
    """What a user's turn says before the clip. Raises ValueError for a translation from an unknown language."""
    if target is not None and spoken is None:
        raise ValueError("to translate what is said, give the language that is spoken too: language='es'")
    if spoken is None:
        return AS_SPOKEN
    asked = f"Transcribe the following speech segment in {spoken.name}"
    return f"{asked}:" if target is None else f"{asked}, then translate it into {target.name}:"
