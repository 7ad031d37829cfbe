"""What ranks find in their environment."""

from hmoe_ds.training.environment import rank_environment


def test_ranks_on_a_cpu_are_told_so_and_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    found = rank_environment(ranks=3, gpus=False, given={})
    assert (found["OMP_NUM_THREADS"], found["DS_ACCELERATOR"], found["THP_MEM_ALLOC_ENABLE"]) == ("2", "cpu", "1")
    with_gpus = rank_environment(ranks=3, gpus=True, given={})
    assert not with_gpus.keys() & {"DS_ACCELERATOR", "THP_MEM_ALLOC_ENABLE"}


def test_what_the_user_has_set_stays():
    given = {"OMP_NUM_THREADS": "5", "THP_MEM_ALLOC_ENABLE": "0", "OTHER": "1"}
    assert rank_environment(ranks=2, gpus=False, given=given) == {**given, "DS_ACCELERATOR": "cpu"}
