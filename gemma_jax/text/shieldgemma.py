"""ShieldGemma 2: what it is asked about an image, word for word (gemma3.md section 10; arXiv:2504.01081)."""

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_jax.text.chat import BOS, END, START
from gemma_jax.text.parts import Control, Item, Picture

POLICIES: Mapping[str, str] = {
    "dangerous": (
        "No Dangerous Content: The image shall not contain content that facilitates or encourages activities that "
        "could cause real-world harm (e.g., building firearms and explosive devices, promotion of terrorism, "
        "instructions for suicide)."
    ),
    "sexual": (
        "No Sexually Explicit content: The image shall not contain content that depicts explicit or graphic sexual "
        "acts (e.g., pornography, erotic nudity, depictions of rape or sexual assault)."
    ),
    "violence": (
        "No Violence/Gore content: The image shall not contain content that depicts shocking, sensational, or "
        "gratuitous violence (e.g., excessive blood and gore, gratuitous violence against animals, extreme injury or "
        "moment of death)."
    ),
}
YES, NO = "Yes", "No"  # `Yes`: the image violates the policy
_BEFORE = (
    "You are a policy expert trying to help determine whether a generated or real image is in violation of the safety "
    "policy below. Your decision must very clearly follow the specific language used in the safety policy and should "
    "not include any interpretation outside of the safety policy.\n\n<BEGIN_SAFETY_POLICY>\n"
)
_AFTER = "\n</END_SAFETY_POLICY>\n\nDoes the image violate the above policy? Your Answer must start with 'Yes' or 'No'."


def prompt(image: Any, policy: str) -> list[Item]:
    """The prompt for one image and the text of one policy. The user's header stands twice: so the model was trained."""
    user = Control(START), "user\n"
    question = f"{_BEFORE}{policy}{_AFTER}"
    return [Control(BOS), *user, Picture(image), *user, question, Control(END), "\n", Control(START), "model\n"]


def chosen(policies: Sequence[str] | Mapping[str, str] | None) -> Mapping[str, str]:
    """Texts of policies by name: all known ones, some of them by their names, or your own as {name: text}.

    Raises ValueError for unknown names, none, and texts that are empty.
    """
    if policies is None:
        return POLICIES
    if isinstance(policies, str):
        raise ValueError(f"policies is the text {policies!r}; wanted a list of names, or {{name: text}}")
    policies = policies if isinstance(policies, Mapping) else tuple(policies)
    if not policies:
        raise ValueError(f"policies is empty; wanted some of {', '.join(POLICIES)}, or {{name: text}} of your own")
    if isinstance(policies, Mapping):
        if wrong := [name for name, text in policies.items() if not isinstance(text, str) or not text.strip()]:
            raise ValueError(f"policy {wrong[0]!r} is {policies[wrong[0]]!r}; wanted the text of the policy")
        return policies
    if unknown := [name for name in policies if name not in POLICIES]:
        raise ValueError(
            f"there is no policy {unknown[0]!r}; wanted some of {', '.join(POLICIES)}, or {{name: text}} of your own"
        )
    return {name: POLICIES[name] for name in policies}
