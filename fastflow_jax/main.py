"""python -m fastflow_jax.main --config=configs/demo.py [--config.seed=1 ...] [--workdir=DIR]."""

import errno
import sys

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Experiment, as configs/demo.py or configs/demo.py:poly", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run folder; unset: runs/<config>-<argument>-<backbone>"
)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "describe"], "What to do")


def main(argv: list[str]) -> None:
    """Read the flags, call one function."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; flags begin with two dashes")
    if _CONFIG.value is None:
        raise app.UsageError("name an experiment: --config=configs/demo.py")
    # Imported here, so that --help answers at once.
    from fastflow_jax import describe, experiment
    from fastflow_jax.config import fill

    if _MODE.value == "describe":
        print(describe.describe(fill(_CONFIG.value)))
        return
    config = fill(_CONFIG.value)
    name = flags.FLAGS["config"].config_filename
    experiment.run(config, _WORKDIR.value or experiment.default_workdir(name, config))


def _parse(argv: list[str]) -> list[str]:
    """Parse flags; a misspelt config field is the user's to put right, not a traceback."""
    from fastflow_jax.config import misspelt
    from fastflow_jax.errors import InputError

    try:
        return flags.FLAGS(argv)
    except (flags.Error, InputError) as error:
        sys.exit(_fail(str(error), 2))
    except AttributeError:
        message = misspelt(flags.FLAGS["config"].value, argv)
        if message is None:
            raise
        sys.exit(_fail(message, 2))


def cli() -> None:
    """Run `main`; what a user can put right ends in one message and status 2."""
    from fastflow_jax.errors import InputError

    def run(argv):
        from fastflow_jax.train import Interrupted

        try:
            main(argv)
        except InputError as error:
            sys.exit(_fail(str(error), 2))
        except Interrupted as stop:
            sys.exit(_fail(f"{stop}; the same command goes on from there", stop.exit_code))
        except KeyboardInterrupt:
            sys.exit(_fail("interrupted before anything was to be saved", 130))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            sys.exit(_fail(f"{error}: free some space or choose another --workdir", 2))

    app.run(run, flags_parser=_parse)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    cli()
