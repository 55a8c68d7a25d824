"""Weights from Hugging Face's hub and from Kaggle: downloaded once, into the libraries' own caches.

The libraries do the work (resuming, caching, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, KAGGLE_API_TOKEN); here stands which
files are wanted, and what errors mean to someone who wants a model. They come with the `hub` extra, imported late.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILES = [  # no pickles, and no GGUF unless it is named
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "tokenizer.model",
    "*.jinja",
]
KAGGLE = "kaggle:"
_EXTRA = "run `pip install 'gemma-jax[hub]'`"
# Of these the hub's name says that the model is only pretrained.
_WITH_PT = ("gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b")
_WITH_IT = ("functiongemma", "shieldgemma-2", "translategemma", "medgemma")  # these are tuned, and their names say so


def repository(name: str) -> str:
    """Google's repository of a published model: "gemma-3-1b" -> "google/gemma-3-1b-pt"."""
    short = name.lower().removeprefix("google/")
    if short.startswith(_WITH_IT) and not short.endswith(("-it", "-pt")):
        return f"google/{short}-it"
    return f"google/{short}-pt" if short in _WITH_PT else f"google/{short}"


def is_reference(source: str) -> bool:
    """Whether a text names something to download: "owner/name", "owner/name:file.gguf" or "kaggle:...".

    A text that ends in a suffix of model files is a path, whatever stands before.
    """
    if source.startswith(KAGGLE):
        return True
    repo, _, file = source.partition(":")
    is_path = repo.startswith((".", "/", "~")) or Path(repo).suffix in (".gguf", ".safetensors", ".json", ".model")
    return repo.count("/") == 1 and all(repo.split("/")) and not is_path and (not file or file.endswith(".gguf"))


def download(
    source: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    cache: Path | None = None,
) -> Path:
    """The local folder (or .gguf file) of a model, downloaded if it is not there; what was begun goes on.

    Args:
        source: see `is_reference`.
        revision: a branch, tag or commit. A commit that is there is used without asking anyone.
        token: None: HF_TOKEN, or what `hf auth login` stored.
        endpoint, cache: the hub's address and a folder instead of the library's own settings.

    Raises: ImportError that names the extra; PermissionError for licences and tokens; FileNotFoundError for what is not
        there, or cannot be reached and is not in the cache; OSError for other answers of the hub.
    """
    if source.startswith(KAGGLE):
        return _from_kaggle(source.removeprefix(KAGGLE))
    return _from_hub(source, {"revision": revision, "token": token, "endpoint": endpoint, "cache_dir": cache})


def _from_hub(source: str, options: Mapping[str, Any]) -> Path:
    try:
        import httpx2
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(f"{source} would come from Hugging Face's hub, whose library is missing: {_EXTRA}") from error
    repo, _, file = source.partition(":")

    def get(**more: Any) -> Path:
        if file:
            return Path(hub.hf_hub_download(repo, file, **options, **more))
        return Path(hub.snapshot_download(repo, allow_patterns=FILES, **options, **more))

    try:
        try:
            found = get()
        except httpx2.TransportError:  # it answered nothing: what is there may be enough
            found = get(local_files_only=True)
    except (httpx2.HTTPError, errors.EntryNotFoundError, ConnectionError) as error:
        raise _explained(error, repo, options["revision"], file) from error
    if found.is_dir() and not any(found.rglob("*.safetensors")):
        api = hub.HfApi(options["endpoint"], options["token"])
        raise FileNotFoundError(_without_weights(repo, api, options["revision"]))
    return found


def _explained(error: Exception, repo: str, revision: str | None, file: str) -> OSError:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    login = "set HF_TOKEN (https://huggingface.co/settings/tokens) or run `hf auth login`"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(f"{repo} is given to those who accept its licence: do so at {page}, then {login}")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{repo} has no revision {revision!r}; see {page}/commits")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"{repo} is neither a path here nor a repository of the hub that you may see; if it is private, {login}"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
        return FileNotFoundError(
            f"{repo} is not, or not wholly, in the local cache, and the hub cannot be reached ({_cause(error)}). "
            "Connect and try again (a download goes on where it stopped), or give the path of a checkpoint"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return FileNotFoundError(f"{repo} has no file {file!r}; see {page}/tree/{revision or 'main'}")
    if status in (401, 403):
        return PermissionError(f"the hub refuses the token for {repo} (HTTP {status}): {login}")
    return OSError(f"the hub failed for {repo}: {_cause(error)}; try again, a download goes on where it stopped")


def _cause(error: BaseException) -> str:
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return (str(error) or type(error).__name__).splitlines()[0]


def _without_weights(repo: str, api: Any, revision: str | None) -> str:
    names = api.list_repo_files(repo, revision=revision)
    if files := [name for name in names if name.endswith(".gguf")]:
        return f"{repo} has GGUF files only; name one of them, as {repo}:{files[0]} (there are {', '.join(files)})"
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    reason = f"; {pickles[0]} is a pickle, which can run any program and is never read" if pickles else ""
    return f"{repo} has no *.safetensors{reason}"


def _from_kaggle(handle: str) -> Path:
    try:
        import kagglehub  # pyright: ignore[reportMissingImports]
        from kagglehub import exceptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"kaggle:{handle} would come from Kaggle, whose library is missing: {_EXTRA}") from error
    try:
        return Path(kagglehub.model_download(handle))
    except exceptions.UnauthenticatedError as error:
        raise PermissionError(
            f"Kaggle wants to know who downloads {handle}: put an API token (https://www.kaggle.com/settings) into "
            "KAGGLE_API_TOKEN, or run kagglehub.login()"
        ) from error
    except exceptions.KaggleApiHTTPError as error:
        if getattr(error.response, "status_code", None) in (401, 403):
            raise PermissionError(
                f"Kaggle refuses {handle}: accept its licence at https://www.kaggle.com/models, check the token"
            ) from error
        raise FileNotFoundError(f"Kaggle has no model {handle}: {_cause(error)}") from error
