"use strict";
// One page, no library. What the data is: explore() in explore.py. Names only ever become text, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const [rows, columns] = data.grid, patches = rows * columns, count = data.names.length, width = data.width;
  const codes = new Int8Array(bytes(data.codes).buffer), colors = bytes(data.colors);
  const attention = data.heads ? bytes(data.attention) : null;
  const denseOf = new Map(data.dense.map((row, i) => [row, i]));
  const shortName = (row) => data.names[row].split("/").pop();
  // Told apart by people who are colour-blind too (Okabe and Ito, and on).
  const palette = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7d6fd0", "#999933", "#808080",
    "#a6423a", "#3aa6a0", "#b0578d", "#5c8a2e", "#d1a3ff", "#375e97", "#c9b458", "#ff8f6b", "#6b8f71", "#a0a0c8"];

  const state = { row: data.dense[0], query: null, mode: "similarity", head: -1, color: "", only: null, found: null, shown: 100 };
  const view = { x: 0, y: 0, zoom: 1, hover: -1 };
  const maps = data.dense.map(() => new Float32Array(patches));
  const best = new Float32Array(data.dense.length), bestAt = new Int32Array(data.dense.length);
  let range = [0, 1];

  // ---- similarity of one patch with all: the numbers that Codes.similarities gives in Python
  const similar = (dense, patch) => {
    const started = performance.now(), from = (dense * patches + patch) * width;
    const query = new Float32Array(width);
    for (let j = 0; j < width; j++) query[j] = codes[from + j] * data.scales[j] * data.scales[j];
    const all = new Float32Array(maps.length * patches);
    for (let i = 0, at = 0; i < maps.length; i++) {
      const map = maps[i];
      best[i] = -2;
      for (let p = 0; p < patches; p++, at += width) {
        let sum = 0;
        for (let j = 0; j < width; j++) sum += codes[at + j] * query[j];
        sum = Math.max(-1, Math.min(1, sum));
        map[p] = all[i * patches + p] = sum;
        if (sum > best[i]) { best[i] = sum; bestAt[i] = p; }
      }
    }
    all.sort();
    range = [all[Math.floor(0.3 * (all.length - 1))], all[Math.floor(0.998 * (all.length - 1))]];
    if (range[1] - range[0] < 1e-3) range = [range[1] - 1e-3, range[1]];
    state.query = { dense, patch };
    explorer.milliseconds = performance.now() - started;
  };

  // ---- drawing a map of numbers over an image
  const small = document.createElement("canvas");
  small.width = columns; small.height = rows;
  const heat = (context, value, side) => {
    const pixels = context.createImageData(columns, rows);
    for (let p = 0; p < patches; p++) {
      const level = Math.max(0, Math.min(1, value(p))), c = 3 * Math.round(255 * level);
      pixels.data.set([colors[c], colors[c + 1], colors[c + 2], 255 * (0.35 + 0.45 * level)], 4 * p);
    }
    small.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(small, 0, 0, side, side);
  };
  const bySimilarity = (dense) => (p) => (maps[dense][p] - range[0]) / (range[1] - range[0]);
  const byAttention = (dense, head) => {
    const at = (dense * data.heads + Math.max(head, 0)) * patches;
    if (head >= 0) return (p) => attention[at + p] / 255;
    const mean = new Float32Array(patches);  // Of all heads, each over its own largest.
    for (let h = 0; h < data.heads; h++) for (let p = 0; p < patches; p++) mean[p] += attention[at + h * patches + p];
    const most = Math.max(...mean, 1);
    return (p) => mean[p] / most;
  };
  const frame = (context, patch, side, line) => {
    const w = side / columns, h = side / rows, x = (patch % columns) * w, y = Math.floor(patch / columns) * h;
    for (const [color, grow, thick] of [["#fff", 1.5 * line, 3 * line], ["#d6336c", 0.5 * line, 1.8 * line]]) {
      context.strokeStyle = color;
      context.lineWidth = thick;
      context.strokeRect(x - grow, y - grow, w + 2 * grow, h + 2 * grow);
    }
  };
  const sized = (canvas, side) => {
    const pixels = Math.round(side * Math.min(2, devicePixelRatio || 1));
    if (canvas.width !== pixels || canvas.height !== pixels) canvas.width = canvas.height = pixels;
    return [canvas.getContext("2d"), pixels];
  };
  const picture = (context, row, side) => {
    const dense = denseOf.get(row);
    if (dense !== undefined && pictures[dense].complete) return context.drawImage(pictures[dense], 0, 0, side, side);
    const [sheet, x, y] = tileOf(row);
    if (sheet.complete) context.drawImage(sheet, x, y, data.tile, data.tile, 0, 0, side, side);
  };
  const load = (url) => Object.assign(new Image(), { src: url });
  const atlas = data.atlas.map(load), pictures = data.pictures.map(load);
  const tileOf = (row) => {
    const page = data.columns * data.columns, i = row % page;
    return [atlas[Math.floor(row / page)], (i % data.columns) * data.tile, Math.floor(i / data.columns) * data.tile];
  };

  // ---- the image
  const drawImage = () => {
    const canvas = $("image"), [context, side] = sized(canvas, canvas.clientWidth || 400), dense = denseOf.get(state.row);
    picture(context, state.row, side);
    if (dense === undefined) return;
    if (state.mode === "similarity" && state.query) heat(context, bySimilarity(dense), side);
    if (state.mode === "attention" && attention) heat(context, byAttention(dense, state.head), side);
    if (state.query && state.query.dense === dense) frame(context, state.query.patch, side, side / 300);
  };
  const drawScale = () => {
    const [low, bar, high] = $("scale").children, context = bar.getContext("2d"), pixels = context.createImageData(256, 1);
    for (let i = 0; i < 256; i++) pixels.data.set([colors[3 * i], colors[3 * i + 1], colors[3 * i + 2], 255], 4 * i);
    context.putImageData(pixels, 0, 0);
    low.textContent = state.mode === "similarity" ? range[0].toFixed(2) : "0";
    high.textContent = state.mode === "similarity" ? range[1].toFixed(2) : "most";
    $("scale").style.visibility = state.mode === "image" || !denseOf.has(state.row) ? "hidden" : "visible";
  };

  // ---- rows of small pictures; buttons, so that keys and screen readers reach them
  const tiles = (box, list, draw, pressed) => {
    while (box.children.length > list.length) box.lastChild.remove();
    while (box.children.length < list.length) {
      const button = document.createElement("button");
      button.append(document.createElement("canvas"), document.createElement("span"));
      box.append(button);
    }
    list.forEach((one, i) => {
      const button = box.children[i], [canvas, text] = button.children;
      button.onclick = one.click;
      button.title = one.title;
      button.setAttribute("aria-label", `${one.title} ${one.text}`);
      if (pressed) button.setAttribute("aria-pressed", String(pressed(i)));
      text.textContent = one.text;
      draw(...sized(canvas, 112), i);
    });
  };
  const drawNear = () => {
    const near = data.neighbors[state.row] || [];
    tiles($("near"), near.map((row, i) => ({
      title: data.names[row], text: data.similarities[state.row][i].toFixed(2), click: () => select(row),
    })), (context, side, i) => {
      picture(context, near[i], side);
      if (state.color) {
        context.strokeStyle = colorOf(near[i]);
        context.lineWidth = side / 14;
        context.strokeRect(0, 0, side, side);
      }
    });
  };
  const drawHeads = () => {
    const dense = denseOf.get(state.row);
    $("heads").hidden = !attention || dense === undefined;
    if ($("heads").hidden) return;
    const heads = Array.from({ length: data.heads }, (_, h) => h);
    tiles($("headstrip"), heads.map((h) => ({
      title: `Head ${h + 1}`, text: String(h + 1),
      click: () => { state.head = state.mode === "attention" && state.head === h ? -1 : h; setMode("attention"); },
    })), (context, side, h) => {
      picture(context, state.row, side);
      heat(context, byAttention(dense, h), side);
    }, (h) => state.mode === "attention" && state.head === h);
  };
  const drawAll = () => {
    const query = state.query, order = data.dense.map((_, i) => i).filter((i) => !query || i !== query.dense);
    if (query && state.mode === "similarity") order.sort((a, b) => best[b] - best[a]);
    const shown = order.slice(0, state.shown), attends = state.mode === "attention" && attention;
    $("allhead").textContent = attends ? "Attention in all images"
      : query && state.mode === "similarity" ? `The chosen patch of ${shortName(data.dense[query.dense])} in all other images ` : "All images with patches";
    if (query && state.mode === "similarity") {
      const note = document.createElement("small");
      note.textContent = "most similar first; below: the highest similarity";
      $("allhead").append(note);
    }
    tiles($("all"), shown.map((i) => ({
      title: data.names[data.dense[i]], text: query && state.mode === "similarity" ? best[i].toFixed(2) : shortName(data.dense[i]).slice(0, 14),
      click: () => { select(data.dense[i]); $("image").scrollIntoView({ block: "nearest" }); },
    })), (context, side, at) => {
      const i = shown[at];
      picture(context, data.dense[i], side);
      if (attends) heat(context, byAttention(i, state.head), side);
      else if (query && state.mode === "similarity") {
        heat(context, bySimilarity(i), side);
        frame(context, bestAt[i], side, side / 220);
      }
    });
    $("more").hidden = order.length <= state.shown;
  };

  // ---- what is chosen
  const drawFacts = () => {
    const facts = [];
    $("name").textContent = data.names[state.row];
    if (data.labels) facts.push(`class ${data.classes[data.labels[state.row]]}`);
    facts.push(`cluster ${data.clusters[state.row]}`);
    facts.push(denseOf.has(state.row) ? "click a patch to compare it" : `no patches in this page: ${data.dense.length} of ${count} images have them`);
    $("about").textContent = facts.join(" · ");
  };
  const drawAround = () => { drawImage(); drawScale(); drawFacts(); drawHeads(); drawNear(); drawMap(); };
  const select = (row) => {
    state.row = row;
    try { history.replaceState(null, "", `#${row}`); } catch { /* A page inside another may not. */ }
    drawAround();
  };
  const pick = (dense, patch) => {
    similar(dense, patch);
    if (state.mode === "image") state.mode = "similarity";
    setMode("similarity");
  };
  const setMode = (mode) => {
    state.mode = mode;
    for (const button of $("mode").children) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    drawImage(); drawScale(); drawHeads(); drawAll();
  };
  const patchAt = (event) => {
    const box = $("image").getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns), row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    return Math.max(0, Math.min(rows - 1, row)) * columns + Math.max(0, Math.min(columns - 1, column));
  };
  $("image").onclick = (event) => { if (denseOf.has(state.row)) pick(denseOf.get(state.row), patchAt(event)); };
  $("image").onkeydown = (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key], dense = denseOf.get(state.row);
    if (!step || dense === undefined) return;
    event.preventDefault();
    const at = state.query && state.query.dense === dense ? state.query.patch : Math.floor(patches / 2);
    const row = Math.max(0, Math.min(rows - 1, Math.floor(at / columns) + step[0])), column = Math.max(0, Math.min(columns - 1, (at % columns) + step[1]));
    pick(dense, row * columns + column);
  };
  for (const button of $("mode").children) {
    button.onclick = () => setMode(button.dataset.mode);
    if (button.dataset.mode === "attention" && !attention) { button.disabled = true; button.title = "This backbone has no attention maps."; }
  }
  $("more").onclick = () => { state.shown += 100; drawAll(); };

  // ---- the map: thumbnails on a canvas
  const canvas = $("map");
  const box = data.places.reduce((b, [x, y]) => [Math.min(b[0], x), Math.max(b[1], x), Math.min(b[2], y), Math.max(b[3], y)], [9e9, -9e9, 9e9, -9e9]);
  const scaleOf = () => {
    const margin = 60, w = canvas.clientWidth - margin, h = canvas.clientHeight - margin;
    return view.zoom * Math.min(w / Math.max(box[1] - box[0], 1e-6), h / Math.max(box[3] - box[2], 1e-6));
  };
  const placed = (row) => {
    const scale = scaleOf(), [x, y] = data.places[row];
    return [canvas.clientWidth / 2 + (x - (box[0] + box[1]) / 2) * scale + view.x, canvas.clientHeight / 2 - (y - (box[2] + box[3]) / 2) * scale + view.y];
  };
  const tileSide = () => {
    const even = 0.75 * Math.sqrt((canvas.clientWidth * canvas.clientHeight) / count);
    return Math.max(6, Math.min(1.5 * data.tile, Math.max(10, Math.min(48, even)) * Math.sqrt(view.zoom)));
  };
  const groupOf = (row) => (state.color === "class" ? data.labels[row] : data.clusters[row]);
  const colorOf = (row) => palette[groupOf(row) % palette.length];
  const dimmed = (row) => (state.found && !state.found.has(row)) || (state.only !== null && state.color && groupOf(row) !== state.only);
  let waiting = false;
  const drawMap = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; paintMap(); });
  };
  // All images lie painted on a canvas of their own. While a large map is moved that one is moved and stretched, and painted anew
  // when it rests; what is chosen or pointed at is painted over it each time.
  const base = document.createElement("canvas");
  let painted = null, resting = 0, moving = false;
  const paintMap = () => {
    const ratio = Math.min(2, devicePixelRatio || 1), w = canvas.clientWidth, h = canvas.clientHeight, context = canvas.getContext("2d");
    if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) { canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio); }
    const side = tileSide(), edge = state.color ? Math.max(1.5, side / 14) : 0, scale = scaleOf();
    const dx = w / 2 - ((box[0] + box[1]) / 2) * scale + view.x, dy = h / 2 + ((box[2] + box[3]) / 2) * scale + view.y;
    const paint = (context, row, size, line, color) => {
      const x = data.places[row][0] * scale + dx, y = dy - data.places[row][1] * scale;
      if (x < -size || y < -size || x > w + size || y > h + size) return;
      if (line) { context.fillStyle = color; context.fillRect(x - size / 2 - line, y - size / 2 - line, size + 2 * line, size + 2 * line); }
      const [sheet, sx, sy] = tileOf(row);
      if (sheet.complete) context.drawImage(sheet, sx, sy, data.tile, data.tile, x - size / 2, y - size / 2, size, size);
    };
    const look = [w, h, ratio, state.color, state.only, state.found, atlas.filter((sheet) => sheet.complete).length];
    const same = painted && look.every((one, i) => one === painted.look[i]);
    const still = same && painted.x === view.x && painted.y === view.y && painted.zoom === view.zoom;
    if (!still && !(same && moving && count > 500)) {
      const context = base.getContext("2d");
      base.width = canvas.width; base.height = canvas.height;
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.globalAlpha = 0.12;
      for (let row = 0; row < count; row++) if (dimmed(row)) paint(context, row, side, 0, "");
      context.globalAlpha = 1;
      for (let row = 0; row < count; row++) if (!dimmed(row)) paint(context, row, side, edge, state.color ? colorOf(row) : "");
      painted = { ...view, look };
    }
    const by = view.zoom / painted.zoom;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, w, h);
    context.imageSmoothingEnabled = true;
    context.drawImage(base, w / 2 + view.x - (w / 2 + painted.x) * by, h / 2 + view.y - (h / 2 + painted.y) * by, w * by, h * by);
    const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink");
    const [x, y] = placed(state.row);
    context.strokeStyle = ink;
    context.lineWidth = 1.5;
    context.globalAlpha = 0.55;
    for (const row of data.neighbors[state.row] || []) {
      const [a, b] = placed(row);
      context.beginPath(); context.moveTo(x, y); context.lineTo(a, b); context.stroke();
    }
    context.globalAlpha = 1;
    for (const row of data.neighbors[state.row] || []) paint(context, row, side, edge || 1.5, state.color ? colorOf(row) : ink);
    if (view.hover >= 0) paint(context, view.hover, 1.5 * side, Math.max(2, edge), state.color ? colorOf(view.hover) : ink);
    paint(context, state.row, Math.max(1.6 * side, 36), 4, ink);
  };
  const moveMap = () => {
    moving = true;
    clearTimeout(resting);
    resting = setTimeout(() => { moving = false; drawMap(); }, 150);
    drawMap();
  };
  const nearestOnMap = (x, y, within) => {
    let found = -1, least = within * within;
    for (let row = count - 1; row >= 0; row--) {
      if (dimmed(row)) continue;
      const [a, b] = placed(row), distance = (a - x) ** 2 + (b - y) ** 2;
      if (distance < least) { least = distance; found = row; }
    }
    return found;
  };
  const zoomAt = (x, y, factor) => {
    const zoom = Math.max(0.6, Math.min(200, view.zoom * factor)), by = zoom / view.zoom;
    const cx = canvas.clientWidth / 2, cy = canvas.clientHeight / 2;
    view.x = (x - cx) - ((x - cx) - view.x) * by;
    view.y = (y - cy) - ((y - cy) - view.y) * by;
    view.zoom = zoom;
    moveMap();
  };
  const local = (event) => { const b = canvas.getBoundingClientRect(); return [event.clientX - b.left, event.clientY - b.top]; };
  const pointers = new Map();
  let moved = 0;
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoomAt(...local(event), Math.exp(-event.deltaY * 0.0016)); }, { passive: false });
  canvas.onpointerdown = (event) => {
    try { canvas.setPointerCapture(event.pointerId); } catch { /* A pointer that is gone already. */ }
    pointers.set(event.pointerId, local(event));
    if (pointers.size === 1) moved = 0;
    canvas.classList.add("drag");
  };
  canvas.onpointermove = (event) => {
    const here = local(event), before = pointers.get(event.pointerId);
    if (!before) {
      const row = nearestOnMap(...here, Math.max(8, tileSide() * 0.75));
      if (row !== view.hover) { view.hover = row; drawMap(); }
      $("tip").hidden = row < 0;
      if (row >= 0) {
        $("tip").textContent = shortName(row) + (data.labels ? ` · ${data.classes[data.labels[row]]}` : "");
        $("tip").style.left = `${Math.max(0, Math.min(here[0] + 14, canvas.clientWidth - $("tip").offsetWidth - 4))}px`;
        $("tip").style.top = `${here[1] + 18}px`;
      }
      return;
    }
    const other = [...pointers].find(([id]) => id !== event.pointerId);
    if (other) {
      const apart = (p) => Math.hypot(p[0] - other[1][0], p[1] - other[1][1]);
      zoomAt((here[0] + other[1][0]) / 2, (here[1] + other[1][1]) / 2, apart(here) / Math.max(1, apart(before)));
    }
    view.x += (here[0] - before[0]) / pointers.size;
    view.y += (here[1] - before[1]) / pointers.size;
    moved += Math.hypot(here[0] - before[0], here[1] - before[1]);
    pointers.set(event.pointerId, here);
    moveMap();
  };
  canvas.onpointerup = canvas.onpointercancel = (event) => {
    const one = pointers.size === 1;
    pointers.delete(event.pointerId);
    if (!pointers.size) canvas.classList.remove("drag");
    if (event.type === "pointerup" && one && moved < 6) {
      const row = nearestOnMap(...local(event), Math.max(14, tileSide()));
      if (row >= 0) select(row);
    }
  };
  canvas.onpointerleave = () => { view.hover = -1; $("tip").hidden = true; drawMap(); };
  canvas.onkeydown = (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way) return;
    event.preventDefault();
    const [x, y] = placed(state.row);
    let found = -1, least = Infinity;
    for (let row = 0; row < count; row++) {
      if (row === state.row || dimmed(row)) continue;
      const [a, b] = placed(row), along = (a - x) * way[0] + (b - y) * way[1], aside = Math.abs((a - x) * way[1] + (b - y) * way[0]);
      if (along > 0 && aside <= 1.2 * along && along + 2 * aside < least) { least = along + 2 * aside; found = row; }
    }
    if (found < 0) return;
    select(found);
    const [a, b] = placed(found);  // Stays in sight.
    view.x += Math.max(0, 30 - a) - Math.max(0, a - canvas.clientWidth + 30);
    view.y += Math.max(0, 30 - b) - Math.max(0, b - canvas.clientHeight + 30);
    drawMap();
  };
  const middle = (factor) => zoomAt(canvas.clientWidth / 2, canvas.clientHeight / 2, factor);
  const fit = () => { Object.assign(view, { x: 0, y: 0, zoom: 1 }); drawMap(); };
  $("in").onclick = () => middle(1.6);
  $("outwards").onclick = () => middle(1 / 1.6);
  $("fit").onclick = fit;

  // ---- colours, search, theme, keys
  const drawLegend = () => {
    const names = state.color === "class" ? data.classes : state.color ? [...new Set(data.clusters)].sort((a, b) => a - b).map((c) => `cluster ${c}`) : [];
    $("legend").replaceChildren(...names.map((name, group) => {
      const button = document.createElement("button"), dot = document.createElement("i");
      dot.style.background = palette[group % palette.length];
      button.append(dot, name);
      button.setAttribute("aria-pressed", String(state.only === group));
      button.onclick = () => { state.only = state.only === group ? null : group; drawLegend(); drawMap(); };
      return button;
    }));
  };
  for (const [value, text] of [...(data.labels ? [["class", "by class"]] : []), ["cluster", "by cluster"], ["", "none"]]) $("color").append(new Option(text, value));
  $("color").onchange = () => { state.color = $("color").value; state.only = null; drawLegend(); drawNear(); drawMap(); };
  const search = () => {
    const text = $("search").value.trim().toLowerCase();
    const found = text ? data.names.flatMap((name, row) => (name.toLowerCase().includes(text) ? [row] : [])) : [];
    state.found = text ? new Set(found) : null;
    $("found").replaceChildren(...found.slice(0, 12).map((row) => {
      const item = document.createElement("li"), button = document.createElement("button"), icon = document.createElement("canvas"), name = document.createElement("span");
      icon.style.cssText = "width:32px;height:32px;border-radius:4px;flex:none";
      picture(...(([context, side]) => [context, row, side])(sized(icon, 32)));
      name.textContent = data.names[row];
      button.append(icon, name);
      button.onclick = () => { select(row); $("found").replaceChildren(); };
      item.append(button);
      return item;
    }));
    drawMap();
  };
  $("search").oninput = search;
  $("search").onkeydown = (event) => {
    const first = $("found").querySelector("button");
    if (event.key === "Enter" && first) first.click();
    if (event.key === "ArrowDown" && first) { event.preventDefault(); first.focus(); }
    if (event.key === "Escape") { $("search").value = ""; search(); }
  };
  document.addEventListener("click", (event) => { if (!event.target.closest(".search")) $("found").replaceChildren(); });
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = { "+": () => middle(1.6), "=": () => middle(1.6), "-": () => middle(1 / 1.6), 0: fit, s: () => setMode("similarity"), i: () => setMode("image"),
      a: () => attention && setMode("attention"), "/": () => { event.preventDefault(); $("search").focus(); } };
    keys[event.key]?.();
  });
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const kept = () => { try { return localStorage.getItem("dino-theme"); } catch { return null; } };
  const theme = (name) => { document.documentElement.dataset.theme = name || (dark.matches ? "dark" : "light"); drawMap(); };
  dark.onchange = () => theme(kept());
  $("theme").onclick = () => {
    const name = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("dino-theme", name); } catch { /* Then it lasts as long as the page. */ }
    theme(name);
  };

  // ---- begin: colours by class, else by cluster; the patch of the first image that gets most attention
  const explorer = (window.explorer = { data, state, select, pick, milliseconds: 0, ready: false, heat: (dense) => Array.from(maps[dense]) });
  const redraw = () => { drawAround(); drawAll(); };
  theme(kept());
  state.color = $("color").value;
  drawLegend();
  const wanted = Number(location.hash.slice(1));
  if (location.hash && Number.isInteger(wanted) && wanted >= 0 && wanted < count) state.row = wanted;
  const first = denseOf.get(state.row) ?? 0;
  let start = Math.floor(rows / 2) * columns + Math.floor(columns / 2);
  if (attention) { const value = byAttention(first, -1); for (let p = 0; p < patches; p++) if (value(p) > value(start)) start = p; }
  pick(first, start);
  redraw();
  new ResizeObserver(() => { drawImage(); drawMap(); }).observe(document.querySelector("main"));
  Promise.allSettled([...atlas, ...pictures].map((image) => image.decode())).then(() => { redraw(); explorer.ready = true; });
})();
