package feed

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"image/png"
	"slices"
	"time"

	"rendezvous.dev/rendezvous/broker/model"
)

// Web describes one user's list of resources.
type Web struct {
	// ID of the workspace, unique for the client. Name is what the user sees.
	ID, Name  string
	Resources []*model.Resource
	// Now becomes every LastUpdated, so that clients fetch files with fresh tickets whenever they refresh the list.
	Now time.Time
	// FilePath and IconPath give the server-relative paths of a resource's files.
	FilePath, IconPath func(resource string) string
}

// Schema versions of the document.
const (
	Schema11 = "1.1"
	Schema20 = "2.0"
)

// ContentType of a document of a schema version.
func ContentType(schema string) string {
	if schema == Schema11 {
		return "text/xml; charset=utf-8"
	}
	return "application/x-msts-radc+xml; charset=utf-8; radc_schema_version=" + schema
}

type collection struct {
	XMLName       xml.Name  `xml:"http://schemas.microsoft.com/ts/2007/05/tswf ResourceCollection"`
	PubDate       string    `xml:",attr"`
	SchemaVersion string    `xml:",attr"`
	Publisher     publisher `xml:"Publisher"`
}

type publisher struct {
	LastUpdated string           `xml:",attr"`
	Name        string           `xml:",attr"`
	ID          string           `xml:",attr"`
	Description string           `xml:",attr"`
	Resources   []webResource    `xml:"Resources>Resource"`
	Servers     []terminalServer `xml:"TerminalServers>TerminalServer"`
}

type webResource struct {
	ID          string    `xml:",attr"`
	Alias       string    `xml:",attr"`
	Title       string    `xml:",attr"`
	LastUpdated string    `xml:",attr"`
	Type        string    `xml:",attr"`
	Icons       icons     `xml:"Icons"`
	Extensions  struct{}  `xml:"FileExtensions"`
	Folders     *folders  `xml:"Folders"`
	Hosting     []hosting `xml:"HostingTerminalServers>HostingTerminalServer"`
}

type icons struct{ Icons []icon }

type icon struct {
	XMLName    xml.Name
	Dimensions string `xml:",attr"`
	FileType   string `xml:",attr"`
	FileURL    string `xml:",attr"`
}

type folders struct{ Folder []folder }

type folder struct {
	Name string `xml:",attr"`
}

type hosting struct {
	File resourceFile `xml:"ResourceFile"`
	Ref  serverRef    `xml:"TerminalServerRef"`
}

type resourceFile struct {
	FileExtension string `xml:",attr"`
	URL           string `xml:",attr"`
}

type serverRef struct {
	Ref string `xml:",attr"`
}

type terminalServer struct {
	ID          string `xml:",attr"`
	Name        string `xml:",attr"`
	LastUpdated string `xml:",attr"`
}

// iconSizes are those that the schema has an element for.
var iconSizes = []int{16, 32, 48, 64, 100, 256}

// Document gives the list as MS-TSWP XML.
func Document(w Web, schema string) ([]byte, error) {
	at := w.Now.UTC().Format("2006-01-02T15:04:05.0Z")
	c := collection{PubDate: at, SchemaVersion: schema, Publisher: publisher{LastUpdated: at, Name: w.Name, ID: w.ID}}
	var pools []string
	for _, r := range w.Resources {
		wr := webResource{
			ID: w.ID + "/" + r.Name, Alias: r.Name, Title: r.DisplayName, LastUpdated: at, Type: r.Type, Icons: iconsOf(w, r),
			Hosting: []hosting{{File: resourceFile{".rdp", w.FilePath(r.Name)}, Ref: serverRef{r.Pool}}},
		}
		if schema != Schema11 {
			wr.Folders = &folders{[]folder{{"/"}}}
		}
		c.Publisher.Resources = append(c.Publisher.Resources, wr)
		pools = append(pools, r.Pool)
	}
	slices.Sort(pools)
	for _, p := range slices.Compact(pools) {
		c.Publisher.Servers = append(c.Publisher.Servers, terminalServer{ID: p, Name: p, LastUpdated: at})
	}
	body, err := xml.MarshalIndent(c, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("feed: %w", err)
	}
	return append([]byte(xml.Header), append(body, '\n')...), nil
}

func iconsOf(w Web, r *model.Resource) icons {
	cfg, err := png.DecodeConfig(bytes.NewReader(r.Icon))
	if err != nil || cfg.Width != cfg.Height || !slices.Contains(iconSizes, cfg.Width) {
		return icons{}
	}
	return icons{[]icon{{
		XMLName: xml.Name{Local: fmt.Sprintf("Icon%d", cfg.Width)}, Dimensions: fmt.Sprintf("%dx%d", cfg.Width, cfg.Height),
		FileType: "Png", FileURL: w.IconPath(r.Name),
	}}}
}
