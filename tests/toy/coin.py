"The library module of the miniature item: is the coin fair?"

import numpy as np
import pandas as pd

captions = {"figure": "Mean logit of heads and tails: a fair coin has none to show."}


def flips(seed: int, n: int, bias: float = 1.0) -> pd.DataFrame:
    "Predictions of a detector that sees the side of a coin through noise."
    rng, label = np.random.default_rng(seed), np.arange(n) % 2
    side = np.where(label, "heads", "real")
    return pd.DataFrame(dict(run="r0", detector="coin", seed=seed, id=[f"f{k:04d}" for k in range(n)], label=label,
                             generator=side, family=side, set="test", logit=rng.normal(bias * (2 * label - 1), 2)))


def tables(predictions: pd.DataFrame) -> dict:
    return {"table": predictions.groupby("generator", observed=True).logit.agg(["size", "mean", "std"]).reset_index()}


def figures(predictions: pd.DataFrame) -> dict:
    import matplotlib.pyplot as plt
    table = tables(predictions)["table"]
    fig, ax = plt.subplots(figsize=(5, 3))
    ax.bar(table.generator.astype(str), table["mean"])
    ax.set(ylabel="mean logit", title="Coin")
    return {"figure": fig}


def effects(predictions: pd.DataFrame) -> pd.DataFrame:
    mean = predictions.groupby("label").logit.agg(["mean", "sem"])
    gap, error = mean["mean"].diff().iloc[-1], np.hypot(*mean["sem"])
    rows = [("toy-coin-heads", gap), ("toy-coin-tails", -gap)]
    return pd.DataFrame([dict(claim=claim, value=value, low=value - 1.96 * error, high=value + 1.96 * error,
                              n=len(predictions), unit="logit", note="") for claim, value in rows])
