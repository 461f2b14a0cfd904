"""Packaging: everything is read from settings.ini, so that nothing is said twice."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
LICENSES = {"apache2": "Apache-2.0"}
STATUSES = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}


def words(key):
    return settings.get(key, "").split()


demo, dev, browser, track = words("demo_requirements"), words("dev_requirements"), words("browser_requirements"), words("track_requirements")
setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"],
    url=settings["git_url"],
    author=settings["author"],
    author_email=settings["author_email"],
    license=LICENSES[settings["license"]],
    classifiers=[
        f"Development Status :: {STATUSES[settings['status']]}",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["neural_plasticity", "neural_plasticity.*"]),
    package_data={"neural_plasticity": ["embedded/**/*"]},
    python_requires=f">={settings['min_python']}",
    install_requires=words("requirements"),
    extras_require={"demo": demo, "track": track, "dev": demo + track + dev, "browser": demo + browser},
    entry_points={"console_scripts": ["neural-plasticity=neural_plasticity.cli:main"]},
    zip_safe=False,
)
