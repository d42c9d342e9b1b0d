"""What an operator does with the page, in a real Chromium. Needs playwright and nothing of ours; tells JSON.

Arguments: "run" (with --rearm) or "serve", the link as rlrc prints it, the browser, the folder that pictures go into.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

DESKTOP = {"width": 1440, "height": 1000}
PHONE = {"width": 390, "height": 844}
PATIENCE_S = 20
HOLD_MS = 2300


def axe() -> str:
    files = distribution("axe-playwright-python").files or []
    return next(str(file.locate()) for file in files if file.name == "axe.min.js")


def overhear(page: Page, errors: list[str]) -> None:
    """Everything that the browser's console complains about."""
    page.on("console", lambda told: errors.append(told.text) if told.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))


class Visit:
    """One browser's window. ``errors``: what its console complained about; ``found``: what axe-core did, by state."""

    def __init__(self, browser: Browser, link: str, folder: Path, **options: Any) -> None:
        self.page: Page = browser.new_context(**options).new_page()
        self.folder = folder
        self.errors: list[str] = []
        self.found: dict[str, list[str]] = {}
        overhear(self.page, self.errors)
        self.page.goto(link)
        self.until("Running")
        self.wait("document.querySelector('figure img').naturalWidth > 0")

    def wait(self, holds: str) -> None:
        """Until an expression holds; asked from here, for the page's policy lets nothing be evaluated in it."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.page.evaluate(holds):
            if time.monotonic() > deadline:
                raise AssertionError(f"expected {holds}, found {self.page.inner_text('body')}")
            self.page.wait_for_timeout(20)

    def until(self, state: str) -> None:
        self.wait(f"document.getElementById('state').textContent === '{state}'")

    def check(self, state: str) -> None:
        """axe-core's serious and critical findings."""
        self.page.evaluate(Path(axe()).read_text(encoding="utf-8"))
        found = self.page.evaluate("axe.run()")["violations"]
        self.found[state] = [
            f"{one['id']}: {one['nodes'][0]['html'][:200]}: {one['nodes'][0].get('failureSummary')}"
            for one in found
            if one["impact"] in ("serious", "critical")
        ]

    def shoot(self, name: str) -> None:
        self.page.screenshot(path=str(self.folder / f"{name}.png"))

    def canvas(self) -> str:
        return str(self.page.evaluate("document.getElementById('latency').toDataURL()"))

    def hold(self) -> None:
        self.page.locator("#rearm").scroll_into_view_if_needed()
        box = self.page.locator("#rearm").bounding_box()
        assert box is not None
        self.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.page.mouse.down()
        self.page.wait_for_timeout(HOLD_MS)
        self.page.mouse.up()


def operate(visit: Visit) -> dict[str, Any]:
    page, told = visit.page, dict[str, Any]()
    before = visit.canvas()
    page.wait_for_timeout(1500)
    told["moves"] = visit.canvas() != before
    visit.check("running")
    page.wait_for_timeout(6000)
    visit.shoot("desktop")
    page.fill("#text", "wave twice")
    page.press("#text", "Enter")
    visit.wait("document.getElementById('words').textContent === 'wave twice'")

    told["pressed"] = time.monotonic()
    page.locator("#stop").dispatch_event("pointerdown")
    visit.until("Stopped")
    told["seen"] = time.monotonic()
    page.wait_for_timeout(500)
    told["stops"] = page.evaluate(
        "performance.getEntriesByType('resource').filter((one) => new URL(one.name).pathname === '/stop')"
        ".map((one) => [new URL(one.name).origin === location.origin, one.responseStatus])"
    )
    page.wait_for_selector("#rearm", state="visible")
    visit.check("stopped")
    page.click("#bench")
    visit.wait("document.getElementById('benched').textContent.startsWith('p50')")
    told["bench"] = page.inner_text("#benched")
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(500)
    visit.shoot("stopped")

    page.locator("#rearm").dispatch_event("pointerdown")  # let go at once: nothing comes of it
    page.locator("#rearm").dispatch_event("pointerup")
    page.wait_for_timeout(HOLD_MS)
    told["tapped"] = page.inner_text("#state")
    page.fill("#why", "the browser")
    visit.hold()
    visit.until("Running")
    told["rearmed"] = time.monotonic()
    page.keyboard.press("Escape")
    visit.until("Stopped")
    page.wait_for_selector("#rearm", state="visible")
    page.focus("#rearm")
    page.keyboard.down("Enter")
    page.wait_for_timeout(HOLD_MS)
    page.keyboard.up("Enter")
    visit.until("Running")
    told["events"] = page.locator("#events li").all_inner_texts()
    return told


def operate_server(visit: Visit) -> dict[str, Any]:
    page, told = visit.page, dict[str, Any]()
    before = visit.canvas()
    page.wait_for_timeout(1500)
    told["moves"] = visit.canvas() != before
    page.click("#bench")
    visit.wait("document.getElementById('benched').textContent.startsWith('p50')")
    page.keyboard.press("Escape")
    visit.until("Stopped")
    visit.wait("Number(document.getElementById('late').textContent) > 0")  # observations are refused
    visit.check("stopped")
    visit.hold()
    visit.until("Running")
    page.fill("#text", "close it")
    page.click("#speak-form button")
    visit.wait("document.getElementById('words').textContent === 'close it'")
    page.click("#own")
    visit.wait("document.getElementById('words').textContent === 'sent by the client'")
    visit.check("running")
    return told


def unlock(page: Page, url: str, token: str) -> None:
    """Without the token in the link it is asked for."""
    page.goto(url)
    page.fill("#token", token)
    page.press("#token", "Enter")
    page.wait_for_selector("#main", state="visible")


def main(kind: str, link: str, chromium: str, folder: Path) -> dict[str, Any]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        desktop = Visit(browser, link, folder, viewport=DESKTOP, color_scheme="dark" if kind == "run" else "light")
        told = operate(desktop) if kind == "run" else operate_server(desktop)
        phone = {"viewport": PHONE, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
        mobile = Visit(browser, link, folder, color_scheme="light", **phone)
        mobile.page.wait_for_timeout(3000)
        mobile.check("phone")
        mobile.shoot("phone")
        told["wide"] = mobile.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        locked = browser.new_context(color_scheme="light").new_page()
        overhear(locked, mobile.errors)
        unlock(locked, *link.split("#"))
        visits = (desktop, mobile)
        told["errors"] = [error for visit in visits for error in visit.errors]
        told["serious"] = {state: found for visit in visits for state, found in visit.found.items() if found}
        browser.close()
    return told


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))))
