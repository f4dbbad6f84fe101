"""Runs on TPU pods that can be taken away: `python -m launch up|status|logs|down --config FILE`.

    up          plans, then executes: machines, code, checks, the run; restarts after preemptions
    status      what there is and what it has cost
    logs        the logs of all hosts, also while they are running
    down        deletes the machines
    manifest    a Kubernetes JobSet instead;   skypilot    a SkyPilot task instead

`planner` decides (pure), `gcloud` spells commands (pure), `executor` runs them, `host` and `preflight`
run on the machines. docs/launch.md is the user's view.
"""
