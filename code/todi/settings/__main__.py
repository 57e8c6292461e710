"""Prints the page that lists all settings:  python -m todi.settings > docs/settings.md"""

from todi.settings.page import page

print(page(), end="")
