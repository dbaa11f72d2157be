"""The page of ``dino explore`` in a browser: its size, and milliseconds from a click to its picture.

    python benchmarks/explorer.py PAGE.html [--clicks 20] [--shots FOLDER]      (Chromium and its driver installed)

A click is on a random patch of an image; its time ends when the browser has painted what it changed (two animation
frames after the click). Then the map is dragged and zoomed, and its frames are counted. ``--shots`` writes screenshots
at 1200 and 400 pixels, light and dark.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

CLICKS = """
const [clicks, done] = arguments;
const frames = (n) => new Promise((go) => {
  const wait = (left) => left ? requestAnimationFrame(() => wait(left - 1)) : go();
  wait(n);
});
(async () => {
  const image = document.getElementById("image"), found = [];
  let seed = 1;
  const random = () => (seed = (seed * 16807) % 2147483647) / 2147483647;
  for (let i = 0; i < clicks; i++) {
    explorer.select(explorer.data.dense[Math.floor(random() * explorer.data.dense.length)]);
    await frames(3);
    const box = image.getBoundingClientRect();
    const at = { clientX: box.left + random() * box.width, clientY: box.top + random() * box.height, bubbles: true };
    const start = performance.now();
    image.dispatchEvent(new MouseEvent("click", at));
    await frames(2);
    found.push([performance.now() - start, explorer.milliseconds]);
  }
  done(found);
})();
"""
DRAG = """
const [moves, done] = arguments;
const map = document.getElementById("map"), box = map.getBoundingClientRect(), times = [];
const at = (x, y) => ({ clientX: x, clientY: y, pointerId: 1, bubbles: true, cancelable: true });
const send = (type, x, y) => map.dispatchEvent(new PointerEvent(type, at(x, y)));
let x = box.left + box.width / 2, y = box.top + box.height / 2, left = moves, last = performance.now();
send("pointerdown", x, y);
const step = (now) => {
  times.push(performance.now() - last);
  last = performance.now();
  if (!left--) { send("pointerup", x, y); return done(times.slice(1)); }
  if (left % 3) { x += left % 2 ? 7 : -5; send("pointermove", x, y); }
  else map.dispatchEvent(new WheelEvent("wheel", { ...at(x, y), deltaY: left % 2 ? -60 : 55 }));
  requestAnimationFrame(step);
};
requestAnimationFrame(step);
"""


def browser(width: int, height: int, dark: bool = False) -> Any:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver") or ""))
    # A window is at least 500 pixels wide: the page is told another width.
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.set_script_timeout(300)
    return driver


def opened(driver: Any, page: Path) -> float:
    """Seconds until the page is ready."""
    start = time.perf_counter()
    driver.get(page.resolve().as_uri())
    while not driver.execute_script("return Boolean(window.explorer && window.explorer.ready)"):
        time.sleep(0.02)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--clicks", type=int, default=20)
    parser.add_argument("--shots", type=Path)
    args = parser.parse_args()
    driver = browser(1200, 1100)
    ready = opened(driver, args.page)
    clicks = driver.execute_async_script(CLICKS, args.clicks)
    frames = driver.execute_async_script(DRAG, 120)
    counts = driver.execute_script(
        "return [explorer.data.names.length, explorer.data.dense.length, explorer.data.grid]"
    )
    driver.quit()
    result = {
        "bytes": args.page.stat().st_size,
        "images": counts[0],
        "with_patches": counts[1],
        "grid": counts[2],
        "seconds_to_ready": round(ready, 2),
        "click_ms_median": round(statistics.median(row[0] for row in clicks), 1),
        "click_ms_longest": round(max(row[0] for row in clicks), 1),
        "similarity_ms_median": round(statistics.median(row[1] for row in clicks), 1),
        "map_frame_ms_median": round(statistics.median(frames), 1),
        "map_frame_ms_longest": round(max(frames), 1),
    }
    print(json.dumps(result))
    for width in (1200, 400) if args.shots else ():
        for dark in (False, True):
            driver = browser(width, 1100 if width > 500 else 1600, dark)
            opened(driver, args.page)
            args.shots.mkdir(parents=True, exist_ok=True)
            driver.save_screenshot(str(args.shots / f"{args.page.stem}-{width}-{'dark' if dark else 'light'}.png"))
            driver.quit()


if __name__ == "__main__":
    main()
