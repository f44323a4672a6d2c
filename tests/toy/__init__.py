"A miniature project with one item that needs no images and no networks: root/{data,nbs,results}."

import json
from pathlib import Path

HEAD = """import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
from toy import coin

from aigid_repro.data.storage import InputError
from aigid_repro.detect import results"""
PARAMETERS = 'profile = "mini"\nseed = 0\nout = ""\nflips = 200'
BODY = "print('flipping', flips, 'coins into', out)\npredictions = coin.flips(seed, flips)"
SAVE = ("results.save(out, 'toy/coin', predictions, settings=dict(flips=flips), "
        "deviations=['A coin stands in for a detector.'], data='none', root=Path.cwd().parents[1])")
CLAIMS = """\
id,paper,item,statement,measure,direction,published,unit,source,minutes
toy-coin-heads,toy,coin,Heads score higher than tails.,mean logit of heads minus tails,> 0,2.0,logit,Fig 1,0.1
toy-coin-tails,toy,coin,Tails score higher than heads.,mean logit of tails minus heads,> 0,,logit,Fig 1,0.1
toy-coin-edge,toy,coin,It may land on its edge.,share of flips on the edge,> 0,,logit,Fig 2,0.1
"""
ITEMS = "paper,item,notebook,module,title\ntoy,coin,nbs/toy/coin.ipynb,toy.coin,Is the coin fair?\n"
REPORTED = "paper,item,row,column,metric,value,unit,source,note\ntoy,coin,ours,heads,gap,2.0,logit,paper,\n"


def notebook(path: Path, *code: str, tag: str = "parameters", parameters: str = PARAMETERS) -> None:
    "Write an experiment notebook: head, parameters cell, code cells."
    sources = [HEAD.format(tests=str(Path(__file__).parents[1])), parameters, *code]
    prose = "# Is the coin fair?\nThe gap is $\\mu_h - \\mu_t$."
    cells = [dict(cell_type="markdown", id="title", metadata={}, source=prose)]
    for k, source in enumerate(sources):
        tags = {"tags": [tag]} if k == 1 and tag else {}
        cells.append(dict(cell_type="code", id=f"cell{k}", metadata=tags, execution_count=None, outputs=[],
                          source=source))
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))


def make(root: str | Path) -> Path:
    "Lay out the miniature project and return its folder."
    root = Path(root)
    for folder in ("data/reported", "nbs/toy"): (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in {"items.csv": ITEMS, "claims.csv": CLAIMS, "reported/toy.csv": REPORTED}.items():
        (root / "data" / name).write_text(text)
    notebook(root / "nbs/toy/coin.ipynb", BODY, SAVE)
    return root
