"""Write the bundled stream: evaluation alphabets of Omniglot as one Parquet file.

    python benchmarks/bundle_alphabets.py --source omniglot.parquet --out loda/bundled/alphabets.parquet

The source has the columns ``image`` {bytes, path}, ``label_name`` ("Alphabet/character01"), ``split``, ``alphabet`` and
``subset``; only rows with ``subset == "evaluation"`` are read, and the PNG bytes are copied as they are (105 x 105,
one bit). The output has ``image``, ``label`` (0-based, in the order of label_name), ``label_name``, ``split`` and
``task``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# The evaluation alphabets with the most characters: the more classes, the harder, and the more there is to learn.
ALPHABETS = ("Malayalam", "Oriya", "Glagolitic", "Gurmukhi", "Old_Church_Slavonic_(Cyrillic)")


def bundle(source: Path, out: Path, alphabets: tuple[str, ...]) -> None:
    """Write the chosen alphabets; the same input gives the same bytes."""
    columns = ["image", "label_name", "split", "alphabet", "subset", "drawer"]
    table = pq.read_table(source, columns=columns, filters=[("subset", "=", "evaluation")])
    rows = [row for row in table.to_pylist() if row["alphabet"] in alphabets]
    missing = sorted(set(alphabets) - {row["alphabet"] for row in rows})
    if missing:
        raise SystemExit(f"no evaluation alphabet {', '.join(missing)} in {source}")
    rows.sort(key=lambda row: (row["label_name"], row["drawer"]))
    label_of = {name: label for label, name in enumerate(sorted({row["label_name"] for row in rows}))}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns_out = {
        "image": pa.array(
            [{"bytes": row["image"]["bytes"], "path": f"{row['label_name']}/{row['drawer']:02d}.png"} for row in rows],
            image,
        ),
        "label": pa.array([label_of[row["label_name"]] for row in rows], pa.int64()),
        "label_name": pa.array([row["label_name"] for row in rows]),
        "split": pa.array([row["split"] for row in rows]),
        "task": pa.array([row["alphabet"] for row in rows]),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns_out), out, compression="zstd", row_group_size=1000)
    megabytes = out.stat().st_size / 1e6
    print(f"{out}: {len(rows)} images, {len(label_of)} classes, {len(alphabets)} alphabets, {megabytes:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="omniglot.parquet, all alphabets")
    parser.add_argument("--out", type=Path, default=Path("loda/bundled/alphabets.parquet"))
    parser.add_argument("--alphabets", nargs="+", default=list(ALPHABETS), help="names as in the column `alphabet`")
    args = parser.parse_args()
    bundle(args.source, args.out, tuple(args.alphabets))


if __name__ == "__main__":
    main()
