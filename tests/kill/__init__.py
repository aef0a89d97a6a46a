"""The kill matrix: runs are killed, their disk fails, their files are damaged, and nothing may be lost.

    server.py          one process that has torch imported and forks a child for every run (the fork server)
    client.py          starts servers, hands them requests
    child.py           what happens in a child: one run, watched, killed or with a failing disk
    points.py          the places of a run at which it can be killed, and how it is killed there
    watching.py        where those places are hooked in: file operations, files, steps
    faults.py          a disk that fails: refusals, short writes
    configurations.py  the runs: precisions, LoRA and full, accumulation, packing
    oracle.py          what an uninterrupted run gives, and in what another one differs from it
    trials.py          one trial: deaths, resumes, comparison
    damage.py          files that are torn, flipped, swapped, forged
    report.py          the table at the end

By default a slice of every kind runs. Environment variables ask for more (all tests here have the marker ``kill``):

    FINITUNE_KILL=all          the whole matrix; 0.1: a random tenth of it
    FINITUNE_KILL_REPORT=FILE  keep its table, in Markdown
    FINITUNE_KILL_SEED=2       other random choices
    FINITUNE_KILL_JOBS=1       one fork server instead of two
    FINITUNE_KILL_TRIAL={...}  the one trial that a failure has printed
"""
