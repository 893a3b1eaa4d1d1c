// What the pages do beyond showing: colours by hand, tables that sort and filter, sweeps that fold, and, where a server
// makes the page, rows that follow the runs. A page is complete without any of it.
(function () {
  "use strict";
  var root = document.documentElement, FILTER_FROM = 8, THEMES = ["", "light", "dark"];
  var NUMBER = /^[+-]?(\d[\d,]*\.?\d*|\.\d+)(e[+-]?\d+)?%?$/i;
  var words = new WeakMap(), tables = [];

  function element(name, attributes, text) {
    var made = document.createElement(name);
    for (var key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // --- colours --------------------------------------------------------------------------------------------------
  function theme() {
    try { return localStorage.getItem("lmlab-colours") || ""; } catch (error) { return ""; }
  }
  function paint(chosen) {
    if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen; else delete root.dataset.theme;
  }
  function colours() {
    var chosen = root.dataset.theme || "", button = element("button", { type: "button", "class": "colours" });
    function say() { button.textContent = "Colours: " + (chosen || "system"); }
    button.addEventListener("click", function () {
      chosen = THEMES[(THEMES.indexOf(chosen) + 1) % THEMES.length];
      paint(chosen);
      say();
      try { localStorage.setItem("lmlab-colours", chosen); } catch (error) { /* not kept, but shown */ }
    });
    say();
    var header = document.querySelector("header");
    if (header) header.insertBefore(button, header.firstChild);
  }
  paint(theme());

  // --- what a cell holds ----------------------------------------------------------------------------------------
  function value(cell) {
    if (!cell) return null;
    if (cell.dataset.value !== undefined) return cell.dataset.value === "" ? null : Number(cell.dataset.value);
    var text = cell.textContent.trim();
    if (text === "" || text === "–") return null;
    return NUMBER.test(text) ? parseFloat(text.replace(/,/g, "")) : text;
  }
  function order(a, b, down) {
    if (a === null || b === null) return (a === null) - (b === null);  // what is not known comes last either way
    var found = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
    return down ? -found : found;
  }
  function text(cell) {
    if (!words.has(cell)) words.set(cell, cell.textContent.toLowerCase());
    return words.get(cell);
  }

  // --- sorting --------------------------------------------------------------------------------------------------
  function sortRows(rows, column, down) {
    return rows.map(function (row) { return [value(row.cells[column]), row]; })
      .sort(function (one, other) { return order(one[0], other[0], down); })
      .map(function (pair) { return pair[1]; });
  }
  function sort(table) {
    var head = table.querySelector("thead th[aria-sort]");
    if (!head) return;
    var column = head.cellIndex, down = head.getAttribute("aria-sort") === "descending";
    Array.from(table.tBodies).forEach(function (body) {
      var lead = table.dataset.grouped !== undefined ? 1 : 0, rows = Array.from(body.rows).slice(lead);
      if (rows.length > 1) body.append.apply(body, sortRows(rows, column, down));
    });
    if (table.tBodies.length > 1) {
      var firsts = Array.from(table.tBodies).map(function (body) { return body.rows[0]; });
      table.append.apply(table, sortRows(firsts, column, down).map(function (row) { return row.parentNode; }));
    }
  }
  function sorting(table) {
    table.querySelectorAll("thead th:not([data-fixed])").forEach(function (head) {
      var button = element("button", { type: "button" });
      while (head.firstChild) button.appendChild(head.firstChild);
      head.appendChild(button);
      button.addEventListener("click", function () {
        var up = head.getAttribute("aria-sort") !== "ascending";
        table.querySelectorAll("thead th").forEach(function (other) { other.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        sort(table);
      });
    });
  }

  // --- filtering ------------------------------------------------------------------------------------------------
  // All words must be found (!word: must not); of a chosen column also <2.5, >=100 and =8.
  function matcher(query, column) {
    var wanted = query.toLowerCase().replace(/([<>=!])\s+/g, "$1").split(/\s+/).filter(Boolean);
    return function (row) {
      var cells = column < 0 ? Array.from(row.cells) : row.cells[column] ? [row.cells[column]] : [];
      return wanted.every(function (word) {
        var told = column >= 0 && /^(<=|>=|<|>|=)([-+\d.,e]+)$/.exec(word);
        if (told) {
          var found = cells.length ? value(cells[0]) : null, limit = parseFloat(told[2].replace(/,/g, ""));
          if (typeof found !== "number" || isNaN(found)) return false;
          return { "<": found < limit, "<=": found <= limit, ">": found > limit, ">=": found >= limit, "=": found === limit }[told[1]];
        }
        var not = word.length > 1 && word[0] === "!", wordless = not ? word.slice(1) : word;
        return not !== cells.some(function (cell) { return text(cell).indexOf(wordless) >= 0; });
      });
    };
  }
  function show(entry) {
    var query = entry.input ? entry.input.value.trim() : "", total = 0, found = 0;
    var fits = query ? matcher(query, Number(entry.column.value)) : function () { return true; };
    Array.from(entry.table.tBodies).forEach(function (body) {
      var rows = Array.from(body.rows), lead = rows[0] && rows[0].classList.contains("lead") ? rows.shift() : null;
      var folded = lead && body.dataset.open === undefined, fitting = rows.filter(fits);
      // Jobs that fit are shown, folded or not; where only the sweep's own row fits, it is the sweep that was meant.
      var whole = !fitting.length && lead && fits(lead);
      rows.forEach(function (row) {
        row.hidden = query && !whole ? fitting.indexOf(row) < 0 : Boolean(folded);
      });
      total += rows.length;
      found += whole ? rows.length : fitting.length;
      if (lead) lead.hidden = !whole && !fitting.length;
    });
    if (entry.told) entry.told.textContent = query ? found.toLocaleString("en") + " of " + total.toLocaleString("en") : total.toLocaleString("en") + " rows";
  }
  function filtering(entry) {
    var table = entry.table, rows = table.querySelectorAll("tbody tr").length;
    if (rows < FILTER_FROM && table.dataset.filter === undefined) return;
    var box = element("div", { "class": "filter" }), search = element("label", {}, "Filter "), where = element("label", {}, "in ");
    entry.input = element("input", { type: "search", placeholder: "words, !word", autocomplete: "off", spellcheck: "false" });
    entry.column = element("select", {});
    entry.told = element("output", { "aria-live": "polite" });
    entry.column.appendChild(element("option", { value: "-1" }, "all columns"));
    table.querySelectorAll("thead th").forEach(function (head, column) {
      entry.column.appendChild(element("option", { value: String(column) }, head.textContent.trim()));
    });
    search.appendChild(entry.input);
    where.appendChild(entry.column);
    box.append(search, where, entry.told);
    var frame = table.closest(".scroll") || table;
    frame.parentNode.insertBefore(box, frame);
    entry.input.addEventListener("input", function () { show(entry); });
    entry.column.addEventListener("change", function () {
      entry.input.placeholder = entry.column.value === "-1" ? "words, !word" : "words, !word, <2.5, >=100";
      show(entry);
    });
  }

  // --- sweeps fold ----------------------------------------------------------------------------------------------
  function folding(entry, body) {
    var lead = body.rows[0];
    if (!lead || !lead.classList.contains("lead") || lead.querySelector(".fold")) return;
    var button = element("button", { type: "button", "class": "fold", "aria-label": "jobs of " + lead.dataset.name });
    function set(open) {
      if (open) body.dataset.open = ""; else delete body.dataset.open;
      button.setAttribute("aria-expanded", String(open));
      button.textContent = open ? "▾" : "▸";
    }
    button.addEventListener("click", function () { set(body.dataset.open === undefined); show(entry); });
    lead.cells[0].insertBefore(button, lead.cells[0].firstChild);
    set(body.dataset.open !== undefined);
  }
  function unfoldAll(entry) {
    entry.table.querySelectorAll(".fold").forEach(function (button) {
      if (button.getAttribute("aria-expanded") === "false") button.click();
    });
  }

  // --- rows that follow the runs --------------------------------------------------------------------------------
  function merge(entry, fresh) {
    var old = Object.create(null), kept = Object.create(null), held = document.activeElement;
    var around = entry.table.contains(held) && held.closest("tbody"), reachable = "a, button";
    var at = around ? Array.from(around.querySelectorAll(reachable)).indexOf(held) : -1;
    Array.from(entry.table.tBodies).forEach(function (body) { old[body.dataset.key] = body; });
    Array.from(fresh.tBodies).forEach(function (body) {
      var before = old[body.dataset.key];
      kept[body.dataset.key] = true;
      if (before && before.dataset.version === body.dataset.version) return;
      var made = document.importNode(body, true);
      if (before && before.dataset.open !== undefined) made.dataset.open = "";
      if (before) before.replaceWith(made); else entry.table.appendChild(made);
      folding(entry, made);
    });
    Object.keys(old).forEach(function (key) { if (!kept[key]) old[key].remove(); });
    sort(entry.table);
    show(entry);
    if (at < 0) return;
    Array.from(entry.table.tBodies).forEach(function (body) {  // what was replaced or moved has lost the focus
      var again = body.dataset.key === around.dataset.key && body.querySelectorAll(reachable)[at];
      if (again) again.focus({ preventScroll: true });
    });
  }
  function follow() {
    var tag = root.dataset.tag || "", told = document.getElementById("live");
    function later() { setTimeout(look, document.querySelector("[data-running]") ? 5000 : 15000); }
    function look() {
      if (document.hidden) return later();
      fetch(location.pathname, { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} }).then(function (answer) {
        if (answer.status === 304) return null;
        if (!answer.ok) throw new Error(String(answer.status));
        tag = answer.headers.get("ETag") || "";
        return answer.text();
      }).then(function (page) {
        if (told) told.textContent = "Follows the runs; looked at " + new Date().toLocaleTimeString() + ".";
        if (page === null) return;
        var fresh = new DOMParser().parseFromString(page, "text/html");
        tables.forEach(function (entry) {
          var other = entry.table.id && fresh.getElementById(entry.table.id);
          if (other) merge(entry, other);
        });
        ["tally", "notices"].forEach(function (id) {
          var mine = document.getElementById(id), theirs = fresh.getElementById(id);
          if (mine && theirs) mine.replaceWith(document.importNode(theirs, true));
        });
      }).catch(function () {
        if (told) told.textContent = "The server does not answer: what stands here may be old.";
      }).then(later);
    }
    later();
  }

  document.addEventListener("DOMContentLoaded", function () {
    colours();
    document.querySelectorAll("table.sortable").forEach(function (table) {
      var entry = { table: table };
      tables.push(entry);
      filtering(entry);
      sorting(table);
      Array.from(table.tBodies).forEach(function (body) { folding(entry, body); });
      show(entry);
      window.addEventListener("beforeprint", function () { unfoldAll(entry); });
    });
    if (root.dataset.live !== undefined) follow();
  });
})();
