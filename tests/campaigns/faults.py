"""Campaign of faults: killed processes, full disks, lost power, and what else happens to machines.

python tests/campaigns/faults.py                                   # the short form
python tests/campaigns/faults.py --long --out benchmarks/results/campaign_faults.json
"""

import functools
import os
import sys
import tempfile

import campaign
import disturbed
import hosts
import killed
import power

DATA = "made-up textures of 32 x 32 pixels, with squares as defects"
TRIALS = {
    f"`kill -9` at a random moment of {name}": functools.partial(killed.kills, name)
    for name in killed.KILLS
}
TRIALS |= {
    "`kill -9` of one of 2 or 4 host processes, continued by fewer and more": hosts.lost_process,
    "power failure, simulated": power.failures,
    "full disk": disturbed.full_disk,
    "directory of another user": disturbed.read_only,
    "directory removed while a command runs": disturbed.removed,
    "clock set back by a day": disturbed.clock,
    "256 file descriptors": disturbed.few_files,
    "2 GiB of memory": disturbed.little_memory,
    "2 GiB of memory, container with the demo": disturbed.container,
    "SIGTERM, and SIGKILL after 10 s": disturbed.terminated,
    "two processes on one directory": disturbed.together,
    "file system without `flock`": disturbed.no_locks,
    "home directory, or cache in it, of another user": disturbed.foreign_cache,
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="campaign_programs_") as programs:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", programs)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        sys.exit(campaign.main(__doc__, TRIALS, data=DATA))
