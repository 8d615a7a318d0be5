"""What the wheel holds: the command, the rooms, and the configs, whose folders lie beside the package in a checkout."""

from setuptools import find_packages, setup

CONFIGS = {"nepa_plugin.lightly_configs": "lightly_configs", "nepa_plugin.mmseg_configs": "mmseg_configs"}

setup(
    py_modules=["nepa_command"],
    packages=[*find_packages(include=["nepa_plugin*"]), *CONFIGS],
    package_dir=CONFIGS,
    package_data={
        "nepa_plugin": ["py.typed", "analysis/page.html"],
        **{package: ["**/*.yaml", "**/*.py"] for package in CONFIGS},
    },
)
