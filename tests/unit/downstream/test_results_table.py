from hmoe_ds.downstream.evaluate import results_table


def entry(**arms):
    """A set of classes with these test scores, seed by seed."""
    cells = {
        arm: {str(seed): {"test": score, "targets_counted": {"test": 1}} for seed, score in enumerate(scores)}
        for arm, scores in arms.items()
    }
    rows = {"train": 8, "validation": 1, "test": 1, "unreadable": 0}
    return {"task": "classification", "targets": 2, "rows": rows, "arms": cells}


def test_an_arm_that_is_not_through_has_no_mean_over_sets():
    sets = {
        "bace": entry(forest_ecfp=[0.8, 0.9], no_pretraining=[0.7, 0.7], pretrained=[0.5, 0.7]),
        "bbbp": entry(forest_ecfp=[0.6, 0.6], no_pretraining=[None, 0.5]),
    }
    table = results_table({"settings": {"models": {"pretrained": "x"}}, "sets": sets}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert cells[0][-3:] == ["forest_ecfp", "no_pretraining", "pretrained"]
    assert cells[2] == [
        *("bace", "ROC-AUC, %", "8 / 1 / 1 / 0", "1 of 2"), *("85.0 ± 5.0", "70.0 ± 0.0", "60.0 ± 10.0")
    ]  # fmt: skip
    assert cells[3][-3:] == ["60.0 ± 0.0", "50.0 ± 0.0 (1 of 2 seeds)", ""]
    assert cells[4] == ["mean of 2", "ROC-AUC, %", "", "", "72.5", "60.0", ""]


def test_what_the_split_leaves_on_both_sides_is_told():
    sets = {"bace": {**entry(pretrained=[0.8]), "test_scaffolds_in_training": 7}, "bbbp": entry(pretrained=[0.6])}
    table = results_table({"settings": {"models": {"pretrained": "x"}}, "sets": sets})
    assert "whose scaffold, as it is learned from, training has too: 7 of bace. The split" in table.splitlines()[-1]
