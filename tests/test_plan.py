"The plan of a study: how much there is to do, what probes find, and what happens when something is missing or fails."
import pytest
from test_batch import ROOT, TINY, make, new_repo

from bnrcam.data import DataError, VOCFolder
from bnrcam.study import plan
from bnrcam.study.graph import jobs
from bnrcam.study.profile import ProfileError, read_profile

SIZES = {'train': 16, 'val': 6}


def settings(path=ROOT / 'nbs/profiles/mini.yaml', **changes): return {**read_profile(path), **changes}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / 'tiny.yaml'
    path.write_text(TINY)
    return settings(path)


def of(profile): return plan.kinds(jobs(profile, 'scenes', ROOT))


def test_every_job_of_a_stage_is_of_one_kind(tiny):
    for profile in (tiny, settings(), settings(ROOT / 'nbs/profiles/voc.yaml'), settings(ROOT / 'nbs/profiles/when.yaml'),
                    settings(ROOT / 'nbs/profiles/scratch.yaml'), settings(ROOT / 'nbs/profiles/photos.yaml')):
        found = jobs(profile, 'scenes', ROOT)
        stages = [name for name, job in found.items() if 'stages' in job.notebook.parts]
        groups = plan.kinds(found)
        assert sorted(job.name for group in groups.values() for job in group) == sorted(stages)
        for group in groups.values():
            assert len({job.notebook for job in group}) == 1


def test_steps_and_images(tiny):
    found = {name: plan.work(group[0], SIZES) for name, group in of(tiny).items()}
    assert found['trunk'] == (2, 0) and found['train noise1'] == found['train baseline'] == (12, 0)  # 3 epochs of 4 batches
    assert found['cams'] == (0, 16) and found['pseudo'] == (4, 16) and found['segment resnet38'] == (9, 6)  # of val, and of val as test
    sweep = settings(ROOT / 'nbs/profiles/when.yaml')
    found = {name: plan.work(group[0], {}) for name, group in of(sweep).items()}
    assert found['start'] == (0, 80) and found['trial noise1'] == (60, 80)


def test_the_largest_job_of_a_kind_is_probed(monkeypatch):
    "The first start of the sweep learns nothing, so that it could not say what a step costs."
    probed = {}
    def record(probes, job, steps, images, few):
        probed[plan.kind(job)] = steps
        return plan.Estimate(1., 1., 1., 1., 1., {'CPU': 1})
    monkeypatch.setattr(plan, 'estimate', record)
    plan.measure(settings(ROOT / 'nbs/profiles/when.yaml'), ROOT / 'data/start', ROOT)
    assert probed['start'] == 10000 // 16 and probed['trial noise1'] == 4 * 240 // 8


def test_a_smaller_job_has_the_steps_that_were_asked_for(tiny, tmp_path):
    found = of(tiny)
    train = plan.smaller(found['train noise1'][0], 3, 8, tmp_path)
    assert train['train']['epochs'] * (8 // 4) == 3 and train['run'] == 'probe' and train['root'] == str(tmp_path)
    assert train['start'] == 'data/runs/tiny/probe-start/model.safetensors'
    pseudo = plan.smaller(found['pseudo'][0], 2, 16, tmp_path)
    assert pseudo['affinity']['epochs'] * (16 // 4) == 2 and pseudo['affinity']['weights'] == 'data/runs/tiny/trunk/model.safetensors'
    assert found['pseudo'][0].parameters['affinity']['epochs'] == 1  # is not changed
    missing = plan.smaller(of(settings(weights='data/weights/none.pth'))['train noise1'][0], 1, 8, tmp_path)
    assert missing['start'] is None


def test_sizes_from_the_splits_or_the_benchmark(scenes, tmp_path):
    assert plan.split_sizes(['train'], None, scenes)['train'][0] == 8
    sizes = plan.split_sizes(['train', 'val'], 'COCO', tmp_path)
    assert sizes['train'] == (82_081, 'the published size of COCO') and sizes['val'][0] == 40_137


@pytest.mark.parametrize('benchmark', [None, 'VOC'])
def test_unknown_size_names_the_file(benchmark, tmp_path):
    with pytest.raises(DataError, match=r'ImageSets/Segmentation/mine\.txt: no such split'):
        plan.split_sizes(['mine'], benchmark, tmp_path)


def test_missing_profile(tmp_path):
    with pytest.raises(ProfileError, match=r'other\.yaml: no such profile'): plan.plan(tmp_path / 'other.yaml', tmp_path)


@pytest.mark.parametrize('there', [True, False])
def test_few_images_are_a_folder_as_any_other(scenes, tmp_path, there):
    root = plan.few_images(['train', 'val'], 'leaf', scenes if there else tmp_path / 'nowhere', tmp_path / 'few', 3)
    images = VOCFolder(root, 'train', ['apple', 'banana', 'leaf', 'fish', 'flower', 'starfish'], masks=True)
    assert len(images) == 3 and len(VOCFolder(root, 'val', images.classes)) == 3
    assert images.labels.any(1).all() and {*images.mask(images.names[0]).ravel()} - {0}


class Known:
    "Probes of a job whose costs are known: 5 s once, 0.25 s a step, 0.1 s an image; 100 bytes an image."
    def __init__(self): self.most, self.asked = {}, []

    def run(self, job, steps, images):
        self.asked.append((steps, images))
        return plan.Cost(5 + .25 * steps + .1 * images, {'CPU': 10 * images}, 1000 + 100 * images)


def test_costs_are_found_again(tiny):
    probes = Known()
    found = plan.estimate(probes, of(tiny)['pseudo'][0], 100, 1000, few=4)
    assert found[:5] == pytest.approx((5, .25, .1, 1000, 100)) and found.memory == {'CPU': 10 * max(images for _, images in probes.asked)}
    assert max(steps for steps, _ in probes.asked) <= 17 and max(images for _, images in probes.asked) <= 68
    probes.most = {'cams': 6}  # no more CAMs than that are there
    found = plan.estimate(probes, of(tiny)['pseudo'][0], 100, 1000, few=4)
    assert probes.asked[-1] == (1, 6) and found.image == pytest.approx(.1)


def test_a_probe_that_fails_leaves_a_plan(tiny, scenes, monkeypatch):
    def fails(self, job, steps, images):
        raise plan.papermill.PapermillExecutionError(1, 1, '', 'OutOfMemoryError', 'CUDA out of memory. Tried 2 GiB\nmore', [])
    monkeypatch.setattr(plan.Probes, 'run', fails)
    table = plan.measure({**tiny, 'pseudo_labels': [], 'timm_backbones': []}, scenes, ROOT)
    assert set(table['note']) == {'OutOfMemoryError: CUDA out of memory. Tried 2 GiB'} and table['hours'].isna().all()
    said = plan.totals(table, {}, scenes)
    assert 'without 4 kinds of job that failed' in said['time'] and len(plan.readable(table)) == 4


@pytest.mark.slow
def test_make_plan(tmp_path):
    repo = new_repo(tmp_path)
    path = repo / 'nbs/profiles/tiny.yaml'
    path.write_text(TINY.replace('epochs: 3', 'epochs: 1'))
    before = {file for file in repo.rglob('*') if file.is_file() and '__pycache__' not in file.parts}
    result = make(repo, 'plan')
    assert result.returncode == 0, result.stderr
    for words in ('train: 16 images (', 's a step', 'memory GB', 'pretrain baseline', 'train noise1', 'segment resnet38',
                  'one job after the other', 'disk, of the study'):
        assert words in result.stdout, result.stdout
    assert 'nan' not in result.stdout
    left = {file for file in repo.rglob('*') if file.is_file() and '__pycache__' not in file.parts} - before
    assert not [file for file in left if 'probe' in str(file)] and not (repo / 'data/runs/tiny/probe').exists()
