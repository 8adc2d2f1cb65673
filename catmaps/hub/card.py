"""The model card of an exported directory: what it is, its data and figures, how to use it, what it is not."""

from catmaps.evaluation.collect import read_metrics
from catmaps.generation import default_sampling
from catmaps.model import Run
from catmaps.text.manifest import MANIFEST_FILE, load_manifest


def model_card(run: Run, name: str, licence: str | None) -> str:
    """README.md of an exported directory, with the Hub's front matter."""
    parts = [_front_matter(run, licence), f"# {name}", _what(run), _table(run), _use(run, name), LIMITS]
    return "\n\n".join(parts) + "\n"


def run_card(run: Run, name: str, licence: str | None) -> str:
    """README.md of a run that is passed on."""
    use = f"## Use\n\n```\ncatmaps sample {name}\ncatmaps score {name} text.txt\n```"
    terms = [] if licence is None else [f"Licence of the weights: {licence}."]
    return "\n\n".join([f"# {name}", _what(run), _table(run), _recipe(run), use, LIMITS, *terms]) + "\n"


def _recipe(run: Run) -> str:
    config = run.config
    origin = "Trained from scratch" if config.start is None else f"Trained on from the weights of `{config.start}`"
    origin = origin if config.base is None else f"Distilled from `{config.base}`"
    preset = f", preset `{config.preset}`" if config.preset else ""
    return f"{origin}{preset}, seed {config.training.seed}; config.json has all options, metrics.jsonl the curve."


def _front_matter(run: Run, licence: str | None) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [] if licence is None else [f"license: {licence}"]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in ("catmaps", run.kind.replace(" ", "-"))), "---"])


def _what(run: Run) -> str:
    kind = {
        "flow map": "A categorical flow map: it carries Gaussian noise to text in a few network calls",
        "base flow": "A continuous flow over one-hot text, sampled by following it",
    }.get(run.kind, f"A model of discrete text ({run.kind})")
    if run.config.published is not None:
        return f"{kind}. A published checkpoint ({run.config.published.kind}), imported by catmaps; cite its authors."
    return f"{kind}. Trained with catmaps, after *Categorical Flow Maps* (arXiv:2602.12233)."


def _table(run: Run) -> str:
    body, words = run.network.num_parameters()
    network = run.config.network
    rows = {
        "parameters": f"{body / 1e6:.2f}M in the body, {words / 1e6:.2f}M in the vocabulary",
        "network": f"width {network.width}, {network.blocks} blocks, {network.heads} heads",
        "window": f"{run.config.data.length} tokens",
        "tokenizer": f"{run.tokenizer.name}, {run.tokenizer.vocab_size:,} tokens",
        "data": _data(run),
        **_figures(run),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items() if value)])


def _data(run: Run) -> str:
    if not (run.path / MANIFEST_FILE).is_file():
        return ""
    manifest = load_manifest(run.path)
    data = run.config.data
    embedded = data.shards is None and not data.mixture
    corpus = "the embedded public-domain English corpus" if embedded else "own text"
    train = manifest.split("train")
    return f"{corpus}: {train.documents:,} documents, {train.characters:,} characters to train on"


def _figures(run: Run) -> dict[str, str]:
    """From metrics.jsonl, which exported directories do not have."""
    rows = read_metrics(run)
    if not rows:
        return {}
    last = {key: max(row.get(key, 0) for row in rows) for key in ("step", "tokens", "seconds")}
    trained = f"{last['step']:,} steps, {last['tokens']:,} tokens, {last['seconds'] / 60:.0f} min"
    bound = next((row for row in reversed(rows) if "nelbo_bits_per_char" in row), None)
    if bound is None:
        return {"training": trained}
    rate = (
        f"{bound['nelbo_bits_per_char']:.3f} ± {bound['nelbo_stderr']:.3f} bits per character (NELBO, an upper bound)"
    )
    return {"training": trained, "validation": rate}


def _use(run: Run, name: str) -> str:
    steps = default_sampling(run).steps
    return f"""## Use

The code is the package catmaps: the modules in this directory only import it.

```
pip install 'catmaps[hf]'
catmaps sample {name} --num 4
catmaps score {name} text.txt
```

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
prompt = tokenizer("the king of ", return_tensors="pt", add_special_tokens=False).input_ids
written = model.generate(prompt, max_new_tokens=32, max_denoising_steps={steps}, seed=1)
print(tokenizer.decode(written.sequences[0]), written.tokens_per_forward)
```"""


LIMITS = """## Limits

A base model of text as it found it: it follows no instructions, and repeats the errors and opinions of its data. Its
likelihood is known by upper bounds only, which score the base flow (a map's diagonal), not few-step samples."""
