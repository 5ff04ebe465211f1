"""Packaging: all metadata and dependencies come from settings.ini."""
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = {name: cfg[f'{name}_requirements'].split() for name in ('crf', 'study', 'dev')}
extras['study'] += extras['crf']

readme = Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists() else cfg['description']
for place, kind in ((r'!\[([^\]]*)\]\((?!http)', 'raw'), (r'(?<!!)\[([^\]]*)\]\((?!http)', 'blob')):  # relative links are dead elsewhere
    readme = re.sub(place, lambda link: f"{link[0][:-1]}({cfg['git_url']}/{kind}/main/", readme)
pythons = [f'Programming Language :: Python :: 3.{minor}' for minor in range(11, 15)]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', url=cfg['git_url'],
    long_description=readme, long_description_content_type='text/markdown', keywords=cfg['keywords'].split(),
    classifiers=['Development Status :: 3 - Alpha', f"Intended Audience :: {cfg['audience']}", *pythons],
    project_urls={'Source': cfg['git_url'], 'Changelog': f"{cfg['git_url']}/blob/main/CHANGELOG.md"},
    packages=find_packages(include=['bnrcam*']), package_data={'bnrcam.study': ['templates/*']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(), extras_require=extras, zip_safe=False,
    entry_points={'console_scripts': cfg['console_scripts'].split()})
