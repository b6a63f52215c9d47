"""What a kit holds for people: the script that starts it, and a page that says what it does."""

from importlib.resources import files
from string import Template

from fedfora.deployment.kit import CoordinatorKit, SiteKit


def start_script(kit: SiteKit | CoordinatorKit) -> str:
    """Return the script that starts what the kit is for."""
    site = isinstance(kit, SiteKit)
    return template("start.sh.template").substitute(
        what=f"the site {kit.name}" if isinstance(kit, SiteKit) else "the coordinator",
        federation=kit.federation,
        command="site" if site else "coordinator run",
    )


def readme(kit: SiteKit | CoordinatorKit) -> str:
    """Return the kit's page."""
    facts = {"federation": kit.federation, "host": kit.host, "port": kit.port}
    if isinstance(kit, SiteKit):
        return template("site_readme.md").substitute(facts, name=kit.name)
    page = template("coordinator_readme.md")
    return page.substitute(facts, superlink_port=kit.superlink_port)


def template(name: str) -> Template:
    """Return a text of this package, to be filled in."""
    text = files("fedfora.deployment").joinpath(name).read_text(encoding="utf-8")
    return Template(text)
