"""Do the stated rates of false alarms hold on normal test images?

    python benchmarks/false_alarms.py runs/demo-tf_efficientnet_lite0

Thresholds come from the held-out normal training images of a finished run (`fastflow_jax/
thresholds.py`), for several asked rates, and are put to its test images, of which only the normal
ones count, and which nothing was learnt from. Three kinds of false alarm:

- image: the score is above the image threshold;
- pixel: the part of pixels above the pixel threshold, mean over the images;
- a-contrario: some region of the image has a number of false alarms (NFA) as low as one held-out
  image in so many has. Besides, for stated NFAs, the part of images with any region, which is at
  most the NFA where z is what it is taken for: standard normal ("model"), or with windows whose
  energies have the mean and variance that they have in held-out images ("calibrated").

Asked rate, the 95 % interval that the true rate lies in, the rate that was found on n images, and
the 95 % interval of the true rate by what was found there alone (Clopper & Pearson). Where both
intervals overlap, the promise held as far as so many images can tell. `missed` is the part of
defective images below the image threshold, to see what the rate costs.
"""

import argparse
import pathlib
import sys
import warnings

import numpy as np
from scipy import stats
from tqdm import tqdm

from fastflow_jax import data
from fastflow_jax.detector import Detector
from fastflow_jax.evaluation import thresholds
from fastflow_jax.features.prepare import feature_batches

RATES = (0.01, 0.05, 0.1, 0.2)
NFAS = (1.0, 0.1, 0.01)


def look(detector: Detector, source: data.Source) -> dict[str, np.ndarray]:
    """Scores, tails of maps and lowest NFAs of images, and their labels, in their order."""
    scorer, parts = detector.scorer, []
    with tqdm(total=len(source), desc="test images", unit="img") as bar:
        for batch in feature_batches(detector.config, detector.backbone, source):
            features, valid = batch.image, batch.valid
            scores, maps = scorer.score_features(features, valid)
            part = {"score": scores, "tails": thresholds.tails(maps, valid), "label": batch.label}
            if hasattr(scorer, "energies"):
                energies, seen = scorer.energies(features, valid)
                model = thresholds.model_moments([m.shape[1:] for m in features])
                for name, moments in (("model", model), ("calibrated", detector.held_out.moments)):
                    part[name] = thresholds.lowest_log10_nfa(energies, seen, moments)
            parts.append(part)
            bar.update(len(batch.label))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def found(alarms: np.ndarray) -> str:
    """The rate of alarms and its interval."""
    n, hits = len(alarms), int(alarms.sum())
    interval = stats.binomtest(hits, n).proportion_ci(0.95, "exact")
    return f"{hits / n:8.4f}  {interval.low:.4f} to {interval.high:.4f}"


def report(detector: Detector, test: dict[str, np.ndarray]) -> None:
    """A line for each kind and rate."""
    held_out, normal = detector.held_out, test["label"] == 0
    print(
        f"{len(held_out.scores)} held-out and {normal.sum()} test images, all normal; "
        f"{(~normal).sum()} defective"
    )
    print(f"{'':<14}{'asked':>7}  {'interval':<17}{'found':>9}  its interval")

    def line(kind, threshold, text):
        low, high = threshold.interval
        note = "" if threshold.supported else "  not supported by so few"
        print(f"{kind:<14}{threshold.rate:7.2f}  {low:.4f} to {high:.4f} {text}{note}")

    for rate in RATES:
        threshold = held_out.image_threshold(rate)
        missed = np.mean(test["score"][~normal] <= threshold.value)
        line(
            "image",
            threshold,
            f"{found(test['score'][normal] > threshold.value)}  {missed:.3f} missed",
        )
    for rate in RATES:
        threshold = held_out.pixel_threshold(rate)
        shares = thresholds.exceeded(test["tails"][normal], threshold.value)
        error = 1.96 * shares.std(ddof=1) / np.sqrt(len(shares))
        text = f"{shares.mean():8.4f}  {shares.mean() - error:.4f} to {shares.mean() + error:.4f}"
        line("pixel", threshold, text)
    if held_out.log10_nfa is None:
        return
    for rate in RATES:
        threshold = held_out.nfa_threshold(rate)
        missed = np.mean(-test["calibrated"][~normal] <= threshold.value)
        alarms = -test["calibrated"][normal] > threshold.value
        line("a-contrario", threshold, f"{found(alarms)}  {missed:.3f} missed")
    for name in ("model", "calibrated"):
        for nfa in NFAS:
            alarms = test[name][normal] <= np.log10(nfa)
            print(f"NFA {nfa:<6g}{name:<12}at most {nfa:<8g} {found(alarms)}")


def main() -> None:
    """Put the thresholds of one run to its test images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=pathlib.Path, help="a finished run folder of one training")
    detector = Detector.load(parser.parse_args().run)
    test = data.open_dataset(detector.config.data).test
    if test is None:
        sys.exit(f"{detector.config.data.root} has no test images")
    warnings.simplefilter("ignore", UserWarning)  # the table says what is not supported
    report(detector, look(detector, test))


if __name__ == "__main__":
    main()
