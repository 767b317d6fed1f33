// Files of the person's as parts of a message.

const PARTS = { image: "image_url", video: "video_url", audio: "audio_url" };
const SUFFIXES = { mkv: "video", avi: "video", flac: "audio", opus: "audio", m4a: "audio" };

/** "image", "video" or "audio"; undefined: it is none that can be asked about. */
export function kindOf(file) {
  const kind = file.type.split("/")[0];
  return kind in PARTS ? kind : SUFFIXES[file.name.split(".").pop().toLowerCase()];
}

/** The content part that carries the file, once it has been read. */
export async function part(file) {
  const type = PARTS[kindOf(file)];
  return { type, [type]: { url: await dataUrl(file) } };
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
