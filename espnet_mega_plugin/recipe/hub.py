"""Stage 15: a folder as a model hub wants it, made of a pack (stage 14), and its upload.

The folder holds the pack's files and a model card: README.md with the tags a hub searches by, how to use the model, the
tables of RESULTS.md and the configuration. `Speech2Text.from_pretrained("user/name")` loads it back. The upload is
huggingface_hub's; a dry run makes the folder, lists what would be sent and sends nothing.
"""

import argparse
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from espnet_mega_plugin.recipe.pack import NEEDS, PLUGIN, needs_plugin
from espnet_mega_plugin.recipe.results import collect

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

CARD = """\
---
{head}---

# {repo}

{needs}A transducer for speech recognition, trained by the recipe `{corpus}` with
[ESPnet](https://pypi.org/project/espnet/) and `{plugin}`.

```python
import soundfile
from espnet2.bin.asr_transducer_inference import Speech2Text      # and espnet_model_zoo installed

speech2text = Speech2Text.from_pretrained("{repo}")
speech, rate = soundfile.read("speech.wav")                       # {rate}, one channel
text, *_ = speech2text.hypotheses_to_results(speech2text(speech))[0]
```

{results}

## Configuration

<details><summary>config.yaml</summary>

```yaml
{config}```

</details>
"""


def card_head(config: Mapping, exp: Path, corpus: str, lang: str, license_name: str, repo: str) -> str:
    """The YAML a hub reads: tags, language, licence and the word error rate of every decoding."""
    rates = [
        {
            "task": {"type": "automatic-speech-recognition"},
            "dataset": {"name": f"{corpus} {row.dataset}", "type": corpus},
            "metrics": [{"type": "wer", "value": float(row.figures[6]), "name": f"WER, {row.decoding}"}],
        }
        for row in collect(exp)
        if row.kind == "wer"
    ]
    head = {
        "library_name": "espnet",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["espnet", "audio", "automatic-speech-recognition", "transducer", *(["mega"] * needs_plugin(config))],
        **({} if lang == "noinfo" else {"language": lang}),
        "datasets": [corpus],
        "license": license_name,
        **({"model-index": [{"name": repo, "results": rates}]} if rates else {}),
    }
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)


def make_folder(
    pack: Path, exp: Path, folder: Path, repo: str, corpus: str, lang: str, license_name: str
) -> list[Path]:
    """Write `folder` anew from a pack; returns its files, relative to it.

    Raises:
        FileNotFoundError: there is no pack.
        ValueError: `repo` has not the form user/name, or the folder holds something that was not made here.
    """
    if not REPOSITORY.fullmatch(repo):
        raise ValueError(f"--hf_repo {repo!r}: expected user/name")
    if not pack.exists():
        raise FileNotFoundError(f"{pack}: no such pack; stage 14 makes it")
    if folder.exists():
        if not (folder / "meta.yaml").exists():
            raise ValueError(f"{folder} is there and is no unpacked model; remove it or choose another --hf_repo")
        shutil.rmtree(folder)
    with zipfile.ZipFile(pack) as archive:
        archive.extractall(folder)
    meta = yaml.safe_load((folder / "meta.yaml").read_text(encoding="utf-8"))
    text = (folder / meta["yaml_files"]["asr_train_config"]).read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    requires = (meta.get("requires") or {}).get(PLUGIN, "").removeprefix(">=")
    needs = NEEDS.format(plugin=PLUGIN, version=requires, decoder=config["decoder"]) if requires else ""
    results = exp / "RESULTS.md"
    page = CARD.format(
        head=card_head(config, exp, corpus, lang, license_name, repo),
        repo=repo,
        corpus=corpus,
        needs=needs,
        plugin=PLUGIN,
        rate=(config.get("frontend_conf") or {}).get("fs", "16k"),
        # one title a page: RESULTS.md's becomes a section of the card
        results=re.sub(r"^#", "##", results.read_text(encoding="utf-8"), flags=re.M) if results.exists() else "",
        config=text,
    )
    (folder / "README.md").write_text(page, encoding="utf-8")
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def upload(folder: Path, repo: str) -> str:
    """Send a folder to the hub, into a repository that is made where there is none; returns its address.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError(
            "the upload needs huggingface_hub: pip install huggingface_hub, then `hf auth login`; "
            f"{folder} is ready, and --upload_dry_run true makes it without sending it"
        ) from error
    api = HfApi()
    address = api.create_repo(repo, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model and results")
    return str(address)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True, help="zip of stage 14")
    parser.add_argument("--asr_exp", type=Path, required=True, help="its scores and RESULTS.md go into the card")
    parser.add_argument("--folder", type=Path, required=True, help="written anew")
    parser.add_argument("--repo", required=True, help="user/name")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--lang", default="noinfo")
    parser.add_argument("--license", default="cc-by-4.0")
    parser.add_argument("--dry_run", choices=("true", "false"), default="false")
    args = parser.parse_args()
    try:
        make = (args.pack, args.asr_exp, args.folder, args.repo, args.corpus, args.lang, args.license)
        files = make_folder(*make)
        sizes = [(args.folder / path).stat().st_size for path in files]
        for path, size in zip(files, sizes, strict=True):
            print(f"{size / 1e6:10.3f} MB  {path}")
        print(f"{sum(sizes) / 1e6:10.3f} MB  in {len(files)} files of {args.folder} for {args.repo}")
        if args.dry_run == "true":
            print("a dry run: nothing was sent")
        else:
            print(f"sent: {upload(args.folder, args.repo)}")
    except Exception as error:  # of the network and of the hub's many kinds
        sys.exit(f"hub: {error}")


if __name__ == "__main__":
    main()
