// What is seen of a page: the contrast of every text against what is behind it, and whether anything is cut off.
(() => {
  // https://www.w3.org/TR/WCAG22/#dfn-relative-luminance
  const parse = (color) => color.match(/[\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const linear = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const contrasts = {};
  const cut = [];
  let textCount = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim();
    const element = walker.currentNode.parentElement;
    if (!text || !element.checkVisibility() || element.closest("caption, thead, .skip")) continue;
    textCount += 1;
    const [one, other] = [luminance(parse(getComputedStyle(element).color)), luminance(ground(element))];
    contrasts[text.slice(0, 60)] = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    for (const box of range.getClientRects()) if (box.right > innerWidth + 1 || box.left < -1) cut.push(text.slice(0, 60));
  }
  return {
    contrasts,
    cut,
    textCount,
    pageWidth: document.documentElement.scrollWidth,
    ground: getComputedStyle(document.documentElement).backgroundColor,
  };
})();
