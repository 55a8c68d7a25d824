"""Options that several verbs share, and what they mean."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_jax.model import Gemma

DEFAULT_MODEL = "gemma-3-270m"


def verb(verbs: Any, name: str, run: Any, summary: str, *, has_overrides: bool = True) -> argparse.ArgumentParser:
    """A verb's parser with the options that all have; without `--set` where no config is run."""
    parser = verbs.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if has_overrides:
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            dest="overrides",
            metavar="PATH=VALUE",
            help="change the config, for example attention.local.window=256; may be repeated",
        )
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options of verbs that load weights."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"a checkpoint (folder or .gguf file), a hub's owner/name, or {DEFAULT_MODEL} (default; demo extra)",
    )
    parser.add_argument("--lora", metavar="ADAPTER", help="merge a LoRA adapter into the weights")
    parser.add_argument("--revision", help="of a repository of the hub: a branch, tag or commit")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "int8", "stored"),
        help="of weights; int8: kernels rounded, half of bfloat16; stored: as the file has them, small and fast on a "
        "CPU, which auto is for a GGUF there",
    )
    add_ple(parser)
    parser.add_argument("--no-compilation-cache", action="store_true", help="compile every program anew")


def add_ple(parser: argparse.ArgumentParser) -> None:
    """Where per-layer embeddings are; see `loading.load`."""
    parser.add_argument(
        "--ple",
        default="device",
        choices=("device", "host", "mapped"),
        help="3n: where per-layer embeddings are: on the device, in the host's memory, left in the checkpoint",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options of generation; those left out keep the verb's defaults."""
    parser.add_argument("-n", "--max-new-tokens", type=int, metavar="N")
    parser.add_argument("-t", "--temperature", type=float, help="0: always the most likely token")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--min-p", type=float, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, metavar="R")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="ends the answer; may be repeated")


def add_draft(parser: argparse.ArgumentParser) -> None:
    """Options of speculative decoding."""
    parser.add_argument(
        "--draft", metavar="MODEL", help="a smaller model that drafts tokens; the answer stays the same"
    )
    parser.add_argument("--draft-tokens", type=int, metavar="N", help="how many it drafts at once (default: 4)")


def add_images(parser: argparse.ArgumentParser, where: str) -> None:
    """Options of verbs that show images to the model."""
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help=f"{where}; may be repeated")
    parser.add_argument("--pan-and-scan", action="store_true", help="show crops of long images too")


def add_sound(parser: argparse.ArgumentParser, where: str) -> None:
    """Options of verbs that let the model hear."""
    parser.add_argument("--audio", action="append", default=[], metavar="FILE", help=f"{where}; may be repeated")
    parser.add_argument(
        "--long",
        default="cut",
        choices=("cut", "error", "chunk"),
        help="of sound beyond 30 s: cut it, or hear it in clips",
    )


def image_options(options: argparse.Namespace) -> Any:
    """How images are prepared."""
    from gemma_jax.media.images import ImageOptions

    return ImageOptions(pan_and_scan=options.pan_and_scan)


def audio_options(options: argparse.Namespace) -> Any:
    """How sound is prepared."""
    from gemma_jax.media.audio import AudioOptions

    return AudioOptions(long=options.long)


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that were given."""
    names = (
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
        "stop",
        "logprobs",
    )
    return {name: value for name in names if (value := getattr(options, name, None)) is not None}


def load(options: argparse.Namespace) -> "Gemma":
    """The model of the options. Sampling options are checked first: a typing error should not cost a load."""
    from gemma_jax.generate.sampling import sampling_params

    if hasattr(options, "temperature"):
        given = sampling(options)
        sampling_params(**{**given, "stop": tuple(given.get("stop", ()))})
    from gemma_jax.compilation import enable_compilation_cache

    if not options.no_compilation_cache:
        enable_compilation_cache()
    given = {name: getattr(options, name) for name in ("overrides", "lora", "ple")}
    may_be_stored = options.lora is None and options.ple != "host"
    return _loaded(options.model, options.dtype, may_be_stored, revision=options.revision, **given)


def _loaded(source: str, dtype: str, may_be_stored: bool, revision: str | None = None, **given: Any) -> "Gemma":
    """The model, in the dtype for inference if none is asked for."""
    from gemma_jax.loading import find, inference_dtype, load

    path = find(source, revision=revision)
    return load(path, dtype=inference_dtype(path) if dtype == "auto" and may_be_stored else dtype, **given)


def draft(options: argparse.Namespace) -> dict[str, Any]:
    """The draft, loaded, and the number of its tokens, if they were given."""
    given = {} if options.draft_tokens is None else {"draft_tokens": options.draft_tokens}
    return given if options.draft is None else {"draft": _loaded(options.draft, options.dtype, True), **given}
