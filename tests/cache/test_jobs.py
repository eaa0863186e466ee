"""Work off the loop: what was given up touches no page, and threads that hang are replaced."""

import threading

import pytest

from headwater.cache.jobs import Job, JobAbandoned, ThreadJobRunner


def test_a_job_that_was_given_up_gets_no_pages() -> None:
    """They may have another owner by then: a read that hung would overwrite the KV of a request."""
    job = Job(lambda job: None)
    with job.pages():
        pass
    job.abandon()
    with pytest.raises(JobAbandoned), job.pages():
        raise AssertionError("it has the pages")


def test_a_job_that_was_given_up_before_it_began_does_nothing() -> None:
    done: list[Job] = []
    job = Job(done.append)
    job.abandon()
    job.run()
    assert job.is_done() and done == []


def test_a_thread_that_hangs_in_a_job_given_up_is_replaced() -> None:
    """Otherwise a store that hung once would never be asked again."""
    runner = ThreadJobRunner(name="test", num_threads=1)
    hangs, begun, ran = threading.Event(), threading.Event(), threading.Event()

    def hang(job: Job) -> None:
        begun.set()
        hangs.wait()

    hung = runner.submit(hang)
    assert hung is not None and begun.wait(60.0)
    hung.abandon()
    later = runner.submit(lambda job: ran.set())
    try:
        assert later is not None and ran.wait(30.0)
    finally:
        hangs.set()
