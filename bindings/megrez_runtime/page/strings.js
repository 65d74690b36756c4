// What the page says, in English and in Chinese.

const ENGLISH = {
  answering: "Answering",
  anotherTab: "This conversation is being answered in another tab.",
  atWork: "Experts at work",
  broken: "The connection broke before the answer was complete. What had arrived is kept.",
  cancel: "Cancel",
  close: "Close",
  context: "Context",
  conversation: "Conversation",
  conversations: "Conversations",
  continue: "Continue",
  copied: "Copied",
  copy: "Copy",
  delete: "Delete",
  deleted: "Conversation deleted.",
  edit: "Edit",
  error: "The server answered {status}: {detail}",
  experts: "Experts",
  failed: "The answer broke off: {detail}",
  forgetKey: "Forget the key",
  full: "The browser's storage is full, so this conversation is not saved. Delete conversations to make room.",
  heatLabel: "Tokens an expert was chosen for: {layers} layers by {experts} experts. Arrow keys move through it.",
  here: "Layer {layer}, pool {pool}, expert {expert}: {recent} in the last second, {total} since the start",
  hint: "Enter sends · Shift+Enter starts a new line · Esc stops",
  hits: "Found in memory",
  inMemory: "All experts are in memory.",
  key: "Key",
  keyMore: "The server was started with a key. It stays in this browser.",
  keyNeeded: "The server asks for its key.",
  keyTitle: "This server asks for a key",
  keyWrong: "The server refused the key. Keys are kept in this browser.",
  length: "The answer reached the limit of its length.",
  loading: "The model is loading. The answer begins when it is ready.",
  maxTokens: "Longest answer (tokens)",
  memory: "Memory",
  message: "Message",
  more: "The stronger its colour, the more tokens were sent to an expert. Rows between two gaps share a pool of experts.",
  newChat: "New chat",
  noStorage: "This browser keeps nothing for this page: conversations last until it is closed.",
  overflow: "The conversation has {tokens} tokens and the model's context {context}. Shorten a message, or start a new chat.",
  perSecond: "{rate} tokens/s",
  prompt: "Prompt",
  rate: "Tokens a second",
  read: "Read",
  recent: "Now",
  regenerate: "Answer again",
  rename: "Rename",
  retry: "Try again",
  save: "Save",
  seed: "Seed",
  send: "Send",
  serverDefault: "server's",
  settings: "Settings",
  settingsMore: "An empty field leaves the choice to the server.",
  sinceStart: "Since the start",
  stop: "Stop",
  stopped: "Stopped.",
  system: "System prompt",
  temperature: "Temperature",
  theme: "Light or dark",
  toEnd: "To the end",
  tokens: "{count} tokens",
  topP: "Top-p",
  undo: "Undo",
  unreachable: "The server does not answer. Is it running?",
  useKey: "Use the key",
  waiting: "Waiting for the disk",
  welcome: "What would you like to know?",
  welcomeMore: "The model runs on this server. Conversations stay in this browser.",
};

const CHINESE = {
  answering: "正在回答",
  anotherTab: "此对话正在另一个标签页中生成回答。",
  atWork: "专家活动",
  broken: "回答未完成时连接中断，已收到的内容已保留。",
  cancel: "取消",
  close: "关闭",
  context: "上下文",
  conversation: "对话",
  conversations: "对话列表",
  continue: "继续",
  copied: "已复制",
  copy: "复制",
  delete: "删除",
  deleted: "对话已删除。",
  edit: "编辑",
  error: "服务器返回 {status}：{detail}",
  experts: "专家",
  failed: "回答中断：{detail}",
  forgetKey: "清除密钥",
  full: "浏览器存储空间已满，此对话未保存。请删除一些对话。",
  heatLabel: "每个专家处理的词元数：{layers} 层，{experts} 个专家。可用方向键查看。",
  here: "第 {layer} 层，专家池 {pool}，专家 {expert}：最近一秒 {recent}，启动以来 {total}",
  hint: "Enter 发送 · Shift+Enter 换行 · Esc 停止",
  hits: "内存命中",
  inMemory: "所有专家都在内存中。",
  key: "密钥",
  keyMore: "服务器启动时设置了密钥。密钥只保存在此浏览器中。",
  keyNeeded: "服务器需要密钥。",
  keyTitle: "此服务器需要密钥",
  keyWrong: "服务器拒绝了该密钥。密钥只保存在此浏览器中。",
  length: "回答已达到长度上限。",
  loading: "模型正在加载，就绪后开始回答。",
  maxTokens: "回答长度上限（词元）",
  memory: "内存",
  message: "输入消息",
  more: "格子颜色越强，分配给该专家的词元越多。两条间隙之间的各层共用一个专家池。",
  newChat: "新对话",
  noStorage: "此浏览器不保存本页数据，关闭页面后对话会丢失。",
  overflow: "对话共 {tokens} 个词元，超过模型的上下文 {context}。请缩短消息或开始新对话。",
  perSecond: "{rate} 词元/秒",
  prompt: "提示",
  rate: "每秒词元",
  read: "读取",
  recent: "当前",
  regenerate: "重新回答",
  rename: "重命名",
  retry: "重试",
  save: "保存",
  seed: "随机种子",
  send: "发送",
  serverDefault: "服务器默认",
  settings: "设置",
  settingsMore: "留空则使用服务器的设置。",
  sinceStart: "启动以来",
  stop: "停止",
  stopped: "已停止。",
  system: "系统提示词",
  temperature: "温度",
  theme: "浅色或深色",
  toEnd: "回到底部",
  tokens: "{count} 个词元",
  topP: "Top-p",
  undo: "撤销",
  unreachable: "服务器没有响应，它在运行吗？",
  useKey: "使用密钥",
  waiting: "等待磁盘",
  welcome: "想了解些什么？",
  welcomeMore: "模型在此服务器上运行，对话只保存在此浏览器中。",
};

const chinese = navigator.language.toLowerCase().startsWith("zh");
const strings = chinese ? CHINESE : ENGLISH;

/** The sentence called `name`, its {fields} filled in from `values`. */
export function say(name, values = {}) {
  return strings[name].replace(/\{(\w+)\}/g, (_, field) => String(values[field]));
}

/** A number as the reader's language writes it. */
export function number(value, digits = 0) {
  return value.toLocaleString(navigator.language, {
    minimumFractionDigits: digits, maximumFractionDigits: digits,
  });
}

/** Fill in what index.html leaves to the language. */
export function translate(root) {
  document.documentElement.lang = chinese ? "zh" : "en";
  for (const node of root.querySelectorAll("[data-text]")) node.textContent = say(node.dataset.text);
  for (const node of root.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", say(node.dataset.label));
    if (node.localName === "button") node.title = say(node.dataset.label);
  }
  for (const node of root.querySelectorAll("[data-placeholder]")) {
    node.placeholder = say(node.dataset.placeholder);
  }
}
