"""Part of tests/gpu/run.py."""


def checks(device, dry):
    yield "nothing yet", lambda: None
