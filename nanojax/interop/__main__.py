"""Converts checkpoints between this project and others.        python -m nanojax.interop"""

import argparse
from pathlib import Path

from nanojax import cli, files, xla
from nanojax.cli import run_main
from nanojax.interop import convert
from nanojax.run import checkpoint, run_folder

EXAMPLES = """\
  python -m nanojax.interop import nanochat-d32 runs/nanochat-d32        a folder from the hub -> a run folder
  python -m nanojax.interop import ~/.cache/nanochat/base_checkpoints/d20 runs/d20
  python -m nanojax.interop export runs/d32 d32-hf                       -> transformers' NanoChat (safetensors)
  python -m nanojax.interop export runs/d32 d32-nanochat --to=nanochat   -> model_NNNNNN.pt, meta_NNNNNN.json
  python -m nanojax.interop export runs/d32 d32-hf --dtype=bf16
Neither torch nor transformers is needed, and no pickled code is run.
"""


def _import(a: argparse.Namespace) -> None:
    convert.check_free(Path(a.run))
    found = convert.load(Path(a.folder), Path(a.tokenizer) if a.tokenizer else None, a.step)
    for note in found.notes:
        print(f"note: {note}")
    convert.to_run(found, Path(a.run))
    stored = found.config.stored
    print(
        f"{a.run}: {found.config.model.parameters:,} parameters of step {found.step}, "
        f"blocks {stored.blocks}, embed {stored.embed}, head {stored.head}"
    )
    print(f"next: python -m nanojax.sample --run={a.run} --prompt='The'; --train.init={a.run} trains on from it")


def _export(a: argparse.Namespace) -> None:
    files.check_empty(a.out)
    convert.check_export(a.to, run_folder.read_config(a.run).model)
    config, params, tokenizer, step = checkpoint.load(a.run, None, a.step)
    params, quantised = convert.floats(config.model, params, a.dtype)
    if quantised:
        print(f"note: {', '.join(quantised)} are quantised in the run and are written as the floats they stand for")
    if a.to == "nanochat":
        convert.export_nanochat(Path(a.out), config, params, tokenizer, step)
    else:
        convert.export_transformers(Path(a.out), config, params, tokenizer)
    base = "to $NANOCHAT_BASE_DIR (~/.cache/nanochat)"
    for path in sorted(Path(a.out).iterdir()):
        room = "tokenizer" if path.name.startswith("token") else f"base_checkpoints/d{config.model.depth}"
        print(f"{path}  {path.stat().st_size:,} bytes" + (f"  {base}/{room}/" if a.to == "nanochat" else ""))


def main() -> None:
    """The command."""
    parser = cli.Parser(
        "python -m nanojax.interop",
        "Converts checkpoints: nanochat's and Hugging Face's into run folders, run folders into both.",
        EXAMPLES,
    )
    commands = parser.add_subparsers(required=True, metavar="import|export")
    take = commands.add_parser("import", help="a nanochat or Hugging Face checkpoint folder -> a run folder")
    take.add_argument(
        "folder", type=cli.path, help="folder with model_NNNNNN.pt, meta_NNNNNN.json, or config.json, *.safetensors"
    )
    take.add_argument("run", type=cli.path, help="run folder to make")
    take.add_argument("--step", type=int, help="nanochat: which model_NNNNNN.pt; default: the newest")
    take.add_argument(
        "--tokenizer", type=cli.path, help="tokenizer.pkl or tokenizer.json, if it is not beside the weights"
    )
    take.set_defaults(do=_import)
    give = commands.add_parser("export", help="a run folder -> a nanochat or Hugging Face checkpoint folder")
    give.add_argument("run", type=cli.path, help="run folder")
    give.add_argument("out", type=cli.path, help="folder to write, empty or new")
    give.add_argument("--to", choices=["hf", "nanochat"], default="hf", help="layout (hf)")
    give.add_argument("--dtype", choices=[*checkpoint.DTYPES], help="default: as stored, quantised ones as f32")
    give.add_argument("--step", type=int, help="a checkpoint's step; default: the newest")
    give.set_defaults(do=_export)
    a = parser.parse_args()
    xla.configure()
    a.do(a)


if __name__ == "__main__":
    run_main(main)
