"The sweep that asks when the noise helps, on tiny settings: from the profile to its table and figures, and checked again."
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from test_batch import ROOT, make, new_repo

from bnrcam.scenes import make_scene, scene_rng
from bnrcam.study.graph import trials
from bnrcam.study.profile import read_profile
from bnrcam.study.trials import SETTINGS, best_cells, differences, regions

COMMITTED = ROOT / 'nbs/profiles/when.yaml'


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    repo = new_repo(tmp_path_factory.mktemp('when'))
    profile = yaml.safe_load(COMMITTED.read_text())
    profile |= {'variants': ['baseline', 'noise1'], 'random_seeds': [0, 1], 'label_seeds': [0], 'augment': {'long_side': [48, 64], 'crop': 48},
                'inference': {'scales': [48], 'batch_size': 8}, 'train': {**profile['train'], 'epochs': 1}}
    profile['when'] |= {'starts': [0, 32], 'contexts': [1.0], 'epochs': [], 'rates': [], 'weights': [0.5], 'train_scenes': 8,
                        'scored_scenes': 4}
    (repo / 'nbs/profiles/when.yaml').write_text(yaml.safe_dump(profile))
    (repo / 'data/start').mkdir(parents=True)
    shutil.copy(ROOT / 'data/start/conformer_mini.safetensors', repo / 'data/start')
    result = make(repo, 'reproduce', 'PROFILE=when')
    assert result.returncode == 0, result.stdout + result.stderr
    return repo


def test_every_trial_is_there_and_no_network_is_kept(study):
    profile = read_profile(study / 'nbs/profiles/when.yaml')
    runs = [step.run for step in trials(profile)]
    assert len(runs) == len({*runs}) == 2 * 2 * 2 + 2 * 2 + 2  # the start alone; contexts; the second loss's weight
    for run in runs:
        result = json.loads((study / f'reports/when/{run}/trial.json').read_text())
        assert 0 <= result['miou'] <= result['best_miou'] <= 100 and result['provenance']['training']['lr'] == 5e-5
        assert abs(sum(result['shares']['attention'].values()) - 100) < 1e-3
        assert not (study / f'data/runs/when/{run}').exists()
    assert {path.name for path in (study / 'data/runs/when').iterdir() if path.is_dir()} == {'start-0', 'start-32'}


def test_page_table_and_figures(study):
    out = study / 'reports/when'
    assert all((out / f'{name}.png').stat().st_size > 10_000 for name in ('when_starts', 'when_settings'))
    table = pd.read_csv(out / 'when_best.csv', keep_default_na=False)
    assert table['further scenes'].tolist() == [0, 0, 32, 32] and table['mIoU (%)'].str.match('[0-9]').all()
    assert 'id="when_best"' in (out / 'index.html').read_text()


def test_second_time_nothing_runs_and_verify(study):
    assert 'Nothing to do' in make(study, 'reproduce', 'PROFILE=when').stdout
    result = make(study, 'verify', 'PROFILE=when')
    assert result.returncode == 0 and 'when_best.csv: every cell' in result.stdout, result.stdout + result.stderr
    table = study / 'reports/when/when_best.csv'
    text = table.read_text()
    try:
        table.write_text(text.replace('noise x 1', 'noise x 9'))
        assert 'WRONG' in make(study, 'verify', 'PROFILE=when').stdout
    finally:
        table.write_text(text)


def test_the_committed_sweep():
    profile = read_profile(COMMITTED)
    runs = [step.run for step in trials(profile)]
    assert len(runs) == len({*runs}) > 300
    assert not any('-baseline-' in run and '-w1-' not in run for run in runs)


def test_regions_cover_a_scene_once():
    for index in range(20):
        scene = make_scene(scene_rng(3, 'val', index))
        for label in scene.labels:
            parts = regions(scene, label).numpy()
            assert np.array_equal(parts.sum(0), scene.mask != 255)
            assert np.array_equal(parts[0] > 0, scene.mask == label)


def rows(**cells):
    "Trials of three seeds: `cells` has the mIoU on both sets of scenes by variant and rate."
    base = {'scenes': 0, 'context_rate': .75, 'epochs': 2, 'weight': 1}
    return pd.DataFrame([{**base, 'variant': variant, 'lr': lr, 'seed': seed, 'chosen_miou': chosen + seed, 'miou': reported + seed}
                         for variant, at in cells.items() for lr, (chosen, reported) in at.items() for seed in range(3)])


def test_a_best_cell_is_chosen_on_the_one_set_and_reported_on_the_other():
    found = best_cells(rows(baseline={1e-5: (70, 60), 1e-4: (69, 75)}, noise1={1e-5: (60, 90), 1e-4: (65, 62)}))
    assert found['best settings'].tolist() == ['lr 1e-05, 2 epochs, weight 1', 'lr 0.0001, 2 epochs, weight 1']
    assert found['mIoU (%)'].tolist() == ['61.0 ± 1.0 (n=3)', '63.0 ± 1.0 (n=3)']
    assert found["less the baseline's best"].tolist() == ['', '+2.0 [+2.0, +2.0] (n=3)']


def test_the_weight_of_the_second_loss_is_compared_with_the_one_baseline():
    trials = rows(baseline={1e-5: (70, 60)}, noise1={1e-5: (70, 61)})
    half = trials[trials['variant'] == 'noise1'].assign(weight=.5, miou=lambda frame: frame['miou'] + 1)
    found = differences(pd.concat([trials, half]))
    assert found[[*SETTINGS]].drop_duplicates().shape[0] == 2 and found['text'].tolist() == [
        '+1.0 [+1.0, +1.0] (n=3)', '+2.0 [+2.0, +2.0] (n=3)']
