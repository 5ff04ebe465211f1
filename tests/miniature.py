"""Small archives of VOC 2012, SBD and COCO 2014, true to their layout, and a server that fails on demand."""
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from bnrcam.data import VOC_CLASSES
from bnrcam.datasets.coco import COCO_CLASSES
from bnrcam.datasets.download import Download
from bnrcam.scenes import voc_palette

GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = [number for number in range(1, 91) if number not in GAPS]


@contextmanager
def serve(folder, ranges=True, tags=True):
    """A server of the files in `folder`; yields an object with `url`, `log` of (path, start, bytes sent), and switches:
    `patience` (bytes until it hangs up; None: never), `ranges`, `tags` (ETag), `status` (an error for all requests),
    `lengths` (Content-Length), `redirects` (from paths to addresses)."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if state.status:
                return self.send_error(state.status)
            if target := state.redirects.get(self.path):
                self.send_response(302)
                self.send_header('Location', target)
                return self.end_headers()
            path = Path(folder, Path(self.path).name)
            if not path.is_file():
                return self.send_error(404)
            content, start = path.read_bytes(), 0
            tag = f'"{hashlib.md5(content).hexdigest()}"'
            asked = self.headers.get('Range') if state.ranges else None
            if asked and self.headers.get('If-Range', tag) == tag:
                start = int(asked.removeprefix('bytes=').removesuffix('-'))
                if start >= len(content):
                    self.send_response(416)
                    self.send_header('Content-Range', f'bytes */{len(content)}')
                    self.send_header('Content-Length', '0')
                    return self.end_headers()
                self.send_response(206)
                self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
            else:
                self.send_response(200)
            if state.tags:
                self.send_header('ETag', tag)
            if state.lengths:
                self.send_header('Content-Length', str(len(content) - start))
            self.end_headers()
            body = content[start:][:state.patience]
            state.log.append((path.name, start, len(body)))
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    state = type('State', (), {})()
    state.url, state.log, state.patience, state.status = f'http://127.0.0.1:{server.server_port}', [], None, None
    state.ranges, state.tags, state.lengths, state.redirects = ranges, tags, True, {}
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def described(path: Path, url: str) -> Download:
    "The Download of a file in the server's folder."
    content = path.read_bytes()
    return Download(f'{url}/{path.name}', len(content), f'md5:{hashlib.md5(content).hexdigest()}', len(content))


def write_sources(path: Path, files: dict) -> Path:
    "A file for bnrcam.datasets.download.read_sources."
    path.write_text(json.dumps({key: asdict(file) for key, file in files.items()}))
    return path


def jpeg(rng, width, height):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, 'JPEG')
    return file.getvalue()


def palette_png(mask):
    image, file = Image.fromarray(mask), io.BytesIO()
    image.putpalette(voc_palette().tobytes())
    image.save(file, 'PNG')
    return file.getvalue()


def voc_mask(rng, height, width, band):
    mask = np.zeros((height, width), np.uint8)
    classes = rng.choice(np.arange(1, 21), 2, replace=False)
    for value, (top, left) in zip(classes, ((4, 5), (height // 2, width // 2))):
        if band:
            mask[top - 2:top + 14, left - 2:left + 18] = 255
        mask[top:top + 12, left:left + 16] = value
    return mask


def xml(name, mask):
    objects = ''.join(f'<object><name>{VOC_CLASSES[value - 1]}</name><difficult>0</difficult></object>'
                      for value in np.unique(mask) if 0 < value < 255)
    return (f'<annotation><folder>VOC2012</folder><filename>{name}.jpg</filename><size><width>{mask.shape[1]}</width>'
            f'<height>{mask.shape[0]}</height><depth>3</depth></size>{objects}</annotation>').encode()


def sbd_mat(mask):
    "As SBD stores it: a struct GTcls with Boundaries (20 sparse matrices), Segmentation and CategoriesPresent."
    boundaries = np.empty((20, 1), object)
    for index in range(20):
        boundaries[index, 0] = np.zeros(mask.shape, np.uint8)
    file = io.BytesIO()
    savemat(file, {'GTcls': {'Boundaries': boundaries, 'Segmentation': mask,
                             'CategoriesPresent': np.unique(mask[mask > 0])[:, None]}}, do_compression=True)
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, 'w:gz' if path.suffix == '.tgz' else 'w') as tar:
        for folder in sorted({str(Path(name).parent) for name in files}):
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def voc_archives(folder: Path, url: str) -> dict[str, Download]:
    "VOC: 6 train, 4 val. SBD: 4 of these train, 2 of val, 5 of its own, spread over its two lists: train_aug has 11."
    rng = np.random.default_rng(0)
    train, val = [f'2007_{i:06d}' for i in range(6)], [f'2008_{i:06d}' for i in range(4)]
    own = [f'2010_{i:06d}' for i in range(5)]
    unlabelled = ['2011_000001']  # VOC has pictures that no list of ours names
    sizes = {name: (int(rng.integers(60, 90)), int(rng.integers(50, 80))) for name in train + val + own + unlabelled}
    voc, sbd = {}, {}
    root, dataset = 'VOCdevkit/VOC2012', 'benchmark_RELEASE/dataset'
    for name, (width, height) in sizes.items():
        mask = voc_mask(rng, height, width, band=True)
        voc[f'{root}/JPEGImages/{name}.jpg'] = picture = jpeg(rng, width, height)
        voc[f'{root}/Annotations/{name}.xml'] = xml(name, mask)
        if name in train + val:
            voc[f'{root}/SegmentationClass/{name}.png'] = palette_png(mask)
            voc[f'{root}/SegmentationObject/{name}.png'] = palette_png(mask)
        if name in train[:4] + val[:2] + own:
            sbd[f'{dataset}/img/{name}.jpg'] = picture
            sbd[f'{dataset}/cls/{name}.mat'] = sbd_mat(np.where(mask == 255, 0, mask).astype(np.uint8))
            sbd[f'{dataset}/inst/{name}.mat'] = b'not read'
    for split, names in {'train': train, 'val': val, 'trainval': train + val}.items():
        voc[f'{root}/ImageSets/Segmentation/{split}.txt'] = '\n'.join(names).encode() + b'\n'
    sbd[f'{dataset}/train.txt'] = '\n'.join(train[:3] + val[:1] + own[:4]).encode()
    sbd[f'{dataset}/val.txt'] = '\n'.join(train[3:4] + val[1:2] + own[4:]).encode()
    sbd['benchmark_RELEASE/benchmark_code_RELEASE/demo.m'] = b'% not read'
    return {'voc': described(write_tar(folder / 'VOCtrainval_11-May-2012.tar', voc), url),
            'sbd': described(write_tar(folder / 'benchmark.tgz', sbd), url)}


def run_lengths(region):
    "Uncompressed run lengths, column by column, beginning with zeros."
    flat = np.flatnonzero(np.diff(region.ravel(order='F').astype(int), prepend=0, append=0))
    return {'size': list(region.shape), 'counts': np.diff(flat, prepend=0, append=region.size).tolist()}


def coco_shapes(rng, height, width, count, points=12, crowds=True):
    "Annotations of one image: polygons (some of several parts), a crowd as run lengths and one as a compressed string."
    from pycocotools import mask as coco_rle
    shapes = []
    for _ in range(count):
        parts = []
        for _ in range(rng.choice([1, 1, 1, 2])):
            turn = np.sort(rng.uniform(0, 2 * np.pi, points))
            radius = rng.uniform(0.6, 1, points) * rng.uniform(5, min(height, width) / 3)
            x, y = rng.uniform(0, width) + radius * np.cos(turn), rng.uniform(0, height) + radius * np.sin(turn)
            parts.append(np.stack([x.clip(0, width), y.clip(0, height)], 1).ravel().round(2).tolist())
        shapes.append({'segmentation': parts, 'iscrowd': 0})
    for compress in (False, True) if crowds else ():
        region = np.zeros((height, width), np.uint8)
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        region[top:top + height // 3, left:left + width // 3] = 1
        shape = run_lengths(region)
        if compress:
            rle = coco_rle.encode(np.asfortranarray(region))
            shape = {'size': [height, width], 'counts': rle['counts'].decode()}
        shapes.append({'segmentation': shape, 'iscrowd': 1})
    return [{**shape, 'category_id': int(rng.choice(COCO_IDS))} for shape in shapes]


def coco_json(rng, split, count, size=(60, 80), objects=4, points=12):
    "The content of instances_SPLIT2014.json for `count` images with annotations and one without."
    content = {'info': {'year': 2014, 'contributor': 'COCO Consortium'}, 'images': [], 'licenses': [{'id': 1}],
               'annotations': [], 'categories': [{'supercategory': 'any', 'id': number, 'name': name}
                                                 for number, name in zip(COCO_IDS, COCO_CLASSES)]}
    for number in range(1, count + 2):
        image = {'license': 1, 'file_name': f'COCO_{split}2014_{number:012d}.jpg', 'id': number,
                 'height': size[0], 'width': size[1]}
        content['images'].append(image)
        if number <= count:
            for shape in coco_shapes(rng, *size, objects, points, crowds=number % 3 == 1):
                content['annotations'].append({**shape, 'image_id': number, 'id': len(content['annotations']) + 1,
                                               'area': 1.0, 'bbox': [0, 0, 1, 1]})
    rng.shuffle(content['annotations'])  # COCO does not sort them by image
    return content


def coco_archives(folder: Path, url: str, counts=(7, 4)) -> dict[str, Download]:
    "COCO 2014 with annotated images of both splits, one more image in each, and captions that nobody reads."
    rng = np.random.default_rng(0)
    annotations = {'annotations/captions_train2014.json': b'{}'}
    files = {}
    for split, count in zip(('train', 'val'), counts):
        content = coco_json(rng, split, count)
        annotations[f'annotations/instances_{split}2014.json'] = json.dumps(content).encode()
        pictures = {f'{split}2014/': b''}
        for image in content['images']:
            pictures[f"{split}2014/{image['file_name']}"] = jpeg(rng, 80, 60)
        files[split] = described(write_zip(folder / f'{split}2014.zip', pictures), url)
    return {'annotations': described(write_zip(folder / 'annotations_trainval2014.zip', annotations), url), **files}
