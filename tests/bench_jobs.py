"""A job of bench/ from its gate to its rows, as bench.run takes it when the gate is green."""


def finished(job) -> list:
    job.gate()
    job.ready()
    for _ in range(job.rounds):
        job.turn()
    return job.finish()
